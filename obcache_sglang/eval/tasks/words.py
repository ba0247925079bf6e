"""Words, names and numbers that tasks draw."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable


def _list(words: str) -> list[str]:
    return words.split()


ADJECTIVES = _list(
    "able absent agile amused ancient arctic autumn bitter blank bold brave brief bright broken busy calm careful cheerful clever "
    "cloudy clumsy cold common cosy crisp curious damp daring dark deep distant dizzy dusty eager early elegant empty faint fancy "
    "fierce fluffy foggy fragile fresh frosty gentle giant glad golden grand grim handy happy harsh hasty heavy hidden hollow "
    "honest hungry icy jolly keen kind late lazy light lively lonely loud loyal lucky mellow mild misty modern narrow neat noble "
    "odd pale patient plain polite proud quaint quick quiet rapid rare rough royal rusty salty shaggy sharp shiny shy silent "
    "silver simple sleepy slow small smooth solid spare steady steep stern sturdy sunny swift tall tame tidy tiny vast warm wild"
)
NOUNS = _list(
    "acorn anchor apple arrow badge barn basket beach bell bench berry bicycle blanket boat bottle bridge broom bucket button cabin "
    "camel candle canoe canyon carpet castle cellar chair chapel cherry chimney circle clock cloud coin comet copper cottage "
    "cradle crane curtain desk diamond dolphin donkey door dragon drum eagle engine falcon feather fence ferry field flute forest "
    "fountain fox garden gate glacier glove guitar hammer harbor hat hedge helmet hill island jacket jungle kettle kite ladder "
    "lake lamp lantern lemon library lion mango maple marble market meadow melon mirror monkey moon museum needle oasis ocean "
    "olive onion orchard otter owl paddle palace parrot pencil piano pigeon pillow planet pony puzzle rabbit river rocket saddle"
)

FIRST_NAMES = _list(
    "Ada Albert Alice Anders Bella Bruno Carla Conrad Daphne Dexter Edith Emil Fiona Frank Gemma Gustav Hanna Hector Ingrid Isaac "
    "Jonas Julia Karin Kaspar Laura Leopold Maud Milo Nadia Nils Olga Oscar Paula Pedro Rosa Rupert Selma Silas Thea Victor"
)
LAST_NAMES = _list(
    "Abbott Baxter Brenner Carver Dalton Draper Ekdahl Farrow Fletcher Garland Hale Holloway Ingram Jensen Keller Lindqvist Marlow "
    "Mercer Norwood Olsen Pemberton Quinn Radley Sanders Thorne Underhill Vance Whitaker Yates Zimmer"
)
PLACES = _list(
    "Alderbrook Ashford Birchwood Blackpool Brighton Canterbury Castleton Clearwater Dover Eastham Elmwood Fairview Glenwood "
    "Greenwich Hampton Harlow Highgate Kingsbridge Lakewood Lancaster Maplewood Marlborough Milton Newport Northfield Oakdale Oxford "
    "Plymouth Preston Redhill Richmond Riverside Rockford Salisbury Sheffield Somerset Stafford Stratford Sutton Walton Warwick "
    "Westbrook Weston Windsor Winslow Woodstock Worcester York"
)


def random_word(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def random_number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


RANDOM: dict[str, Callable[[random.Random], str]] = {"words": random_word, "numbers": random_number, "uuids": _random_uuid}


def distinct(draw: Callable[[random.Random], str], rng: random.Random, number: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < number:
        drawn[draw(rng)] = None
    return list(drawn)
