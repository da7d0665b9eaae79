"""Crop a routing page to the map of domains and experts, as a picture for a README.

    python model_cards/crop_page.py quickstart-output/routing.html plots/routing_crop.png

Needs playwright (pip install playwright) and chromium on the PATH. Prints what the picture shows, for its alt text.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

# the least that is not a phone's layout; the picture is as wide as the text in it
WIDTH, MARGIN = 748, 8


def main() -> None:
    """Crop one page; `--layer` is a position, by default the layer whose domains differ most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--layer", type=int)
    given = parser.parse_args()
    print(crop(given.page, given.picture, given.layer))


def crop(path: Path, picture: Path, layer: int | None = None) -> str:
    """Write the picture; returns what it shows, one line a domain.

    Raises:
        SystemExit: If chromium or the map is missing.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("needs chromium on the PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("html[data-state=drawn]", state="attached")
        if not page.locator("#domain-map").count():
            raise SystemExit(f"{path} has no domains. Trace text of several: hf-moe trace --by-domain.")
        page.select_option("#layer-select", str(most_different(page) if layer is None else layer))
        page.screenshot(path=str(picture), full_page=True, clip=area(page))
        rows = page.locator("#domain-table tbody tr").all_inner_texts()
        browser.close()
    return "\n".join(" ".join(row.split()) for row in rows)


def most_different(page: Any) -> int:
    """The layer with the largest mean distance of its domains."""
    script = "JSON.parse(document.getElementById('report').textContent).distances"
    distances = page.evaluate(script)
    means = [sum(column) for column in zip(*distances, strict=True)]
    return means.index(max(means))


def area(page: Any) -> dict[str, float]:
    """From the title to the end of the table, in pixels of the page."""
    boxes = [page.locator(part).bounding_box() for part in ("#domains-title", "#domain-table")]
    left, top = boxes[0]["x"] - MARGIN, boxes[0]["y"] - MARGIN
    bottom = boxes[1]["y"] + boxes[1]["height"] + MARGIN
    return {"x": left, "y": top, "width": boxes[1]["width"] + 2 * MARGIN, "height": bottom - top}


if __name__ == "__main__":
    main()
