"""A program of several stages in one folder: interrupted at any point, the same call continues it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hf_moe.io.json_files import read_json
from hf_moe.io.run_lock import LOCK, RunRefusedError, folder_held
from hf_moe.io.whole_files import temporary, write_json


class ResumableRun:
    """Runs named stages once and remembers what each returned, in `<folder>/<program>.json`.

    Use it as a context manager: the folder is locked while it is open.

    Args:
        identity: What makes two calls the same run (JSON values). A folder begun with another identity is refused.

    Raises:
        RunRefusedError: On entry, if the folder cannot be used; the message says why and what to do.
    """

    def __init__(self, folder: Path, program: str, identity: Mapping[str, Any]):
        self.folder = folder
        self.program = program
        # through JSON, so that it compares equal to what is read back
        self.identity = json.loads(json.dumps(identity))
        self.continued = False
        self._state_file = folder / f"{program}.json"
        self._held = ExitStack()

    def __enter__(self) -> "ResumableRun":
        self._refuse_foreign_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(folder_held(self.folder, self.program))
        try:
            self._state = self._read_state()
        except RunRefusedError:
            self._held.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage; after an interruption, of the part that ran last."""
        return {name: stage["seconds"] for name, stage in self._state["stages"].items()}

    @property
    def interrupted(self) -> list[str]:
        """Stages that were begun more than once."""
        return [name for name, count in self._state["begun"].items() if count > 1]

    def finished(self, name: str) -> bool:
        return name in self._state["stages"]

    def stage(self, name: str, work: Callable[[], Any], *, leaves: tuple[str, ...] = ()) -> Any:
        """The JSON value that `work` returned, now or in an earlier call of the program.

        Args:
            leaves: Paths below the folder that the stage writes and later stages read.

        Raises:
            RunRefusedError: If the stage finished earlier but something that it left is gone.
        """
        if not self.finished(name):
            self._state["begun"][name] = self._state["begun"].get(name, 0) + 1
            write_json(self._state_file, self._state)
            begin = time.perf_counter()
            result = work()
            self._state["stages"][name] = {"seconds": time.perf_counter() - begin, "result": result}
            write_json(self._state_file, self._state)
            # a first run continues with exactly what a continued one would read
            self._state = json.loads(self._state_file.read_text(encoding="utf-8"))
        for path in leaves:
            if not (self.folder / path).exists():
                raise RunRefusedError(
                    f"{path!r} is missing in {str(self.folder)!r} though the stage {name!r} had written it. Delete "
                    "the folder to start again, or choose another --output."
                )
        return self._state["stages"][name]["result"]

    def _refuse_foreign_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunRefusedError(
                f"output {str(self.folder)!r} is a file; it must be a folder. Choose another --output."
            )
        if not self.folder.exists() or self._state_file.exists():
            return
        ours = {LOCK, temporary(self._state_file).name}
        if found := sorted(path.name for path in self.folder.iterdir() if path.name not in ours):
            raise RunRefusedError(
                f"output {str(self.folder)!r} is not empty (it holds {found[0]!r}) and was not begun by "
                f"{self.program}. Choose an empty or new folder with --output."
            )

    def _read_state(self) -> dict[str, Any]:
        if not self._state_file.exists():
            return {"program": self.program, "identity": self.identity, "begun": {}, "stages": {}}
        try:
            state = read_json(self._state_file)
            earlier = state["identity"]
            _ = state["begun"], state["stages"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunRefusedError(
                f"{str(self._state_file)!r} is damaged ({type(error).__name__}). Delete the folder to start again, or "
                "choose another --output."
            ) from error
        self._refuse_other_identity(earlier)
        self.continued = True
        return state

    def _refuse_other_identity(self, earlier: Mapping[str, Any]) -> None:
        names = [name for name in {**earlier, **self.identity} if earlier.get(name) != self.identity.get(name)]
        if names:
            changes = "; ".join(f"{name} was {earlier.get(name)!r}, is {self.identity.get(name)!r}" for name in names)
            raise RunRefusedError(
                f"output {os.fspath(self.folder)!r} was begun with other arguments: {changes}. Repeat the earlier "
                "ones to continue it, or choose another --output."
            )
