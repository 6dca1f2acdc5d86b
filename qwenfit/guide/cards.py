"""Cards as the guide's text names them: "2x A100 80GB or 4x A100 40GB", "single RTX 3090/4090 (bf16)"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwenfit.hardware import Device, find_device


@dataclass(frozen=True)
class NamedCards:
    """`count` cards of one kind, and the precision that the text gives for them (None: it gives none)."""

    text: str
    device: Device
    count: int
    precision: str | None


def named_cards(text: str) -> list[NamedCards]:
    """Every alternative of a text. Raises NotFound for a card that the catalog does not have."""
    found = []
    for part in re.split(r",| or ", text):
        if part.strip() == "better":  # "RTX 3060 12GB or better"
            continue
        precision = re.search(r"\((\w+)\)", part)
        count = re.search(r"(\d+)x ", part)
        names = re.sub(r"\(\w+\)|\d+x |single ", "", part)
        number = int(count[1]) if count else 1
        for name in names.split("/"):
            device = find_device(name.strip())
            name = device.name if name.strip().isdigit() else name.strip()  # the 4090 of "RTX 3090/4090"
            label = f"{number}x {name}" if number > 1 else name
            found.append(NamedCards(label, device, number, precision[1] if precision else None))
    return found
