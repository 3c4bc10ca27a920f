"""What the tiny model learns: one seeded generator a skill."""

from tiny.page import Skill
from tiny.skills.arithmetic import Arithmetic
from tiny.skills.charts import Charts
from tiny.skills.digits import Digits, DigitStrings
from tiny.skills.pairs import Pairs
from tiny.skills.shapes import Shapes
from tiny.skills.words import Words

SKILLS = (Digits, DigitStrings, Words, Shapes, Charts, Pairs, Arithmetic)


def make_skills(*, seed: int, split: str) -> list[Skill]:
    """All generators of a split."""
    return [skill(seed=seed, split=split) for skill in SKILLS]
