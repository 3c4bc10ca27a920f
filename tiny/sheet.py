"""`python -m tiny.sheet FILE`: samples of every skill on one picture, for the documentation."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from tiny.page import Sample, font
from tiny.skills import make_skills

WIDTH, GAP, TEXT = 1180, 10, 34
GREY = (120, 120, 120)


def draw_row(sheet: Image.Image, samples: list[Sample], *, top: int) -> int:
    """Draw as many samples of a skill as fit into the width, each with its first question and answer.

    Returns:
        Where the next row begins.
    """
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, top), samples[0].skill, font=font("DejaVuSans-Bold.ttf", 15), fill=(0, 0, 0))
    top += 22
    x, bottom = GAP, top
    for sample in samples:
        question, answer = sample.questions[0]
        text = f"{question}\n{answer}"
        face = font("DejaVuSans.ttf", 11)
        pages_width = sum(page.picture.width + 2 for page in sample.pages)
        width = max(pages_width, int(draw.multiline_textbbox((0, 0), text, font=face)[2]))
        if x + width > WIDTH - GAP:
            continue
        height = max((page.picture.height for page in sample.pages), default=0)
        left = x
        for page in sample.pages:
            sheet.paste(page.picture, (left, top))
            draw.rectangle((left - 1, top - 1, left + page.picture.width, top + page.picture.height), outline=GREY)
            left += page.picture.width + 2
        draw.multiline_text((x, top + height + 4), text, font=face, fill=(0, 0, 0))
        x += width + 2 * GAP
        bottom = max(bottom, top + height + TEXT)
    return bottom + GAP


def draw_sheet(*, seed: int = 0) -> Image.Image:
    """A picture with some training samples of every skill."""
    sheet = Image.new("RGB", (WIDTH, 3000), (255, 255, 255))
    top = GAP
    for skill in make_skills(seed=seed, split="train"):
        top = draw_row(sheet, [skill.sample(index) for index in range(12)], top=top)
    return sheet.crop((0, 0, WIDTH, top))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny.sheet", description=__doc__)
    parser.add_argument("file", type=Path, help="the PNG to write")
    draw_sheet().save(parser.parse_args().file)


if __name__ == "__main__":
    main()
