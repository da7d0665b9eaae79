"""Start, kill and ask the server."""

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

TESTS = Path(__file__).resolve().parent.parent
# token -> what it may do is in state.USERS
ALICE, CAROL, BOB_READS = "hf_alice_write", "hf_carol_write", "hf_bob_read"


@dataclass
class HubProcess:
    """A server in a child process; `root` outlives a kill, `port` is kept over a restart."""

    root: Path
    xet: bool = False
    port: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **faults: float) -> "HubProcess":
        command = [sys.executable, "-m", "hub_server", "--root", str(self.root), "--port", str(self.port)]
        command += ["--xet"] if self.xet else []
        command += [text for name, value in faults.items() for text in (f"--{name}", str(value))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])
        return self

    def kill(self) -> None:
        """SIGKILL: what is not on disk is lost."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def api(self, token: str | bool = ALICE) -> HfApi:
        return HfApi(endpoint=self.url, token=token)

    def log(self) -> list[dict[str, Any]]:
        """Every request since the start, oldest first: method, path, status."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.url}/_log") as answer:
            return json.load(answer)

    def environment(self, home: Path, token: str | None = ALICE) -> dict[str, str]:
        """For a client in a process of its own."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        own |= {} if self.xet else {"HF_HUB_DISABLE_XET": "1"}
        own |= {} if token is None else {"HF_TOKEN": token}
        inherited = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "PYTHONPATH")}
        return inherited | own

    def lfs_parts(self) -> list[Path]:
        """Uploads that have begun and not ended."""
        return list(self.root.glob("lfs/*.tmp"))
