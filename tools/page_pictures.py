"""Draws the pictures of docs/images: a part of a page each, as headless Chromium shows it.

python examples/python/explain_page.py explanation.html
python examples/python/compare_page.py compared.html benchmarks/results/compare-reviews/results.json
python tools/page_pictures.py explanation.html compared.html
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
#: Name -> (which page, sections that it shows, theme, height).
PICTURES = {
    "explained": (0, ("explained",), "light", 2010),
    "used": (0, ("use",), "dark", 1700),
    "compared": (1, ("summary", "compared"), "dark", 1190),
}
WIDTH = 1180
MOST_BYTES = 300_000
#: A section that begins a picture has no line above its heading.
FLUSH = "main h2 { margin-top: 0; border-top: 0; padding-top: 0 }"


def screenshot(page: str, folder: Path, height: int) -> bytes:
    """The top ``height`` pixels of a page, as PNG."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit("page_pictures: there is no Chromium here")
    source, target = folder / "page.html", folder / "page.png"
    source.write_text(page, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{height}",
        "--virtual-time-budget=20000", f"--screenshot={target}", source.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    return target.read_bytes()


def part_of(page: str, sections: tuple[str, ...], theme: str) -> str:
    """The page with only these sections (``summary``: that at the top), in a theme."""
    hidden = [f"#{name}" for name in ("explained", "use", "compared") if name not in sections]
    if "explained" not in sections:
        hidden.append("#headline")
    if "summary" not in sections:
        hidden += ["header", "header ~ p", "nav", "section.summary"]
    style = f"<style>{', '.join(hidden)} {{ display: none }} {FLUSH}</style></head>"
    page = page.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)
    return page.replace("</head>", style, 1)


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("explained", type=Path, help="of examples/python/explain_page.py")
    parser.add_argument("compared", type=Path, help="of examples/python/compare_page.py")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR")
    options = parser.parse_args()
    pages = [path.read_text(encoding="utf-8") for path in (options.explained, options.compared)]
    for name, (which, sections, theme, height) in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            png = screenshot(part_of(pages[which], sections, theme), Path(folder), height)
        image = Image.open(io.BytesIO(png)).convert("RGB").quantize(256)  # a palette is small
        path = options.out / f"{name}.png"
        image.save(path, optimize=True)
        if path.stat().st_size > MOST_BYTES:
            raise SystemExit(f"page_pictures: {path} is larger than {MOST_BYTES} bytes")
        print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
