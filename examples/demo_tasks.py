"""What the demo adapters learn: six small jobs, their data generators and their score.

Every example is made here from templates and word lists by a seed; nothing comes from outside. A
prompt is the bare input: the adapter alone says what to do with it. ``instruction`` says it in
words, for comparison with the base model. An answer counts if it is equal to the expected one.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

TRAINING_SEED, HELD_OUT_SEED = 1, 2
NUM_TRAINING = 16_000


@dataclasses.dataclass(frozen=True)
class Task:
    """One job and how its adapter is trained."""

    name: str
    instruction: str
    make: Callable[[random.Random], tuple[str, str]]
    """One (input, answer)."""
    adapter_config: dict[str, Any]
    num_steps: int
    batch_size: int
    """Rows a step."""
    max_length: int
    """Tokens a row, several examples in each."""
    learning_rate: float = 1e-3
    trained_on: str = "in float32 on two CPU cores"
    """Where the shipped adapter comes from; either place makes a like one."""

    def training_examples(self, count: int = NUM_TRAINING) -> list[tuple[str, str]]:
        """(input, answer) pairs to learn from, all inputs distinct."""
        return _distinct(self.make, random.Random(f"{self.name} {TRAINING_SEED}"), count, set())

    def held_out_examples(self, count: int) -> list[tuple[str, str]]:
        """Pairs made with another seed, none of whose inputs is among the training ones."""
        seen = {text for text, _ in self.training_examples()}
        return _distinct(self.make, random.Random(f"{self.name} {HELD_OUT_SEED}"), count, seen)


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, but for spaces around it."""
    return answer.strip() == expected


def conversation(text: str, answer: str | None = None) -> list[dict[str, str]]:
    """Chat messages: the input, and the answer where it is to be learnt."""
    messages = [{"role": "user", "content": text}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _distinct(
    make: Callable[[random.Random], tuple[str, str]],
    rng: random.Random,
    count: int,
    seen: set[str],
) -> list[tuple[str, str]]:
    seen, made = set(seen), []
    while len(made) < count:
        text, answer = make(rng)
        if text not in seen:
            seen.add(text)
            made.append((text, answer))
    return made


# -- word lists ------------------------------------------------------------------------------------

FIRST_NAMES = (
    "Ada Alan Amina Anna Boris Carla Chen Clara Daniel David Elena Emil Eva Farid Felix Grace Hana "
    "Henry Ines Ivan Jack Jana Jonas Julia Karim Kate Laura Leo Lin Lucy Marco Maria Max Mia Mina "
    "Nadia Nina Noah Olga Omar Oscar Paul Petra Rosa Ruth Sam Sara Tara Theo Tom Vera Victor Yuki"
).split()
LAST_NAMES = (
    "Adams Baker Bauer Berg Brown Carter Clark Costa Cruz Dale Davis Diaz Evans Fisher Ford Garcia "
    "Gray Green Hall Hansen Hill Holt Hughes Jones Kelly Khan Kim King Klein Lane Lee Lopez Marsh "
    "Mason Meyer Miller Moore Morris Novak Ortiz Parker Patel Perez Price Reed Rossi Scott Silva "
    "Smith Stone Turner Vogel Walker Ward Weber White Wood Wright Young"
).split()
DOMAINS = (
    "acme bluefin brightlab cloudnine corewell daylight eastgate farview goldleaf greenway hilltop "
    "ironworks junction lakeside lumen mapleton northstar oakfield orbit pinewood quartz redhill "
    "riverbend silverline skyport stonegate sunrise tidewater vector westlake"
).split()
THINGS = (
    "apples bags balls bananas birds books bottles buttons cakes candles cards chairs coins cups "
    "eggs flowers hats keys lemons letters marbles nails oranges pencils photos plates shells "
    "spoons stamps stickers stones tickets tomatoes toys"
).split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
NOUNS = (
    "apple army artist baby ball bank bell bird boat book bottle box bread bridge butter cake "
    "candle car carpet castle cat chair church city clock cloud coat coffee corn cow cup desk "
    "doctor dog door dress drum ear egg engine eye farm father field fire fish flower forest "
    "garden gate girl glass gold grass hammer hand hat heart hill honey horse house ice iron "
    "island jacket judge key king kitchen knife lake lamp leaf lemon letter lion milk mirror "
    "money moon mother mountain mouse music nail needle night ocean oil orange paint paper "
    "pencil piano picture pig plane plant plate pocket queen rabbit rain ring river road rock "
    "roof rope rose salt school sea ship shirt shoe silver sister snow soap soldier song spoon "
    "star station stone storm street sugar summer sun table tail teacher tent test tiger tooth "
    "tower town train tree truck valley village wall watch water wheel wind window wine winter "
    "wolf wood wool"
).split()


# -- the jobs --------------------------------------------------------------------------------------


def _contact(rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    user = rng.choice(
        (f"{first}.{last}", f"{first[0]}{last}", f"{first}{rng.randint(1, 99)}", last)
    )
    domain = f"{rng.choice(DOMAINS)}.{rng.choice(('com', 'org', 'net', 'io'))}"
    fields = {
        "name": f"{first} {last}",
        "email": f"{user}@{domain}".lower(),
        "phone": f"{rng.randint(200, 999)}-{rng.randint(0, 9999):04d}",
    }
    template = rng.choice(
        (
            "You can reach {name} at {email} or by phone at {phone}.",
            "Please call {name} on {phone}, or write to {email}.",
            "{name} moved to another desk: the number is {phone} and the mail is {email}.",
            "For questions write to {email} ({name}, phone {phone}).",
            "My name is {name}, my number is {phone} and my email is {email}.",
            "Contact: {email}, {phone}. Ask for {name}.",
            "{phone} is the phone of {name}, who reads mail at {email}.",
            "Send the invoice to {name} <{email}>, and call {phone} if it is late.",
        )
    )
    return template.format(**fields), json.dumps(fields)


TABLES = {
    "books": (("title", "author", "genre"), ("year", "pages", "price")),
    "cities": (("name", "country", "mayor"), ("population", "area", "founded")),
    "employees": (("name", "city", "team"), ("salary", "age", "bonus")),
    "films": (("title", "director", "studio"), ("year", "length", "rating")),
    "flights": (("airline", "origin", "destination"), ("price", "duration", "seats")),
    "orders": (("customer", "product", "status"), ("amount", "total", "weight")),
    "players": (("name", "club", "position"), ("goals", "age", "height")),
    "songs": (("title", "artist", "album"), ("year", "length", "plays")),
    "students": (("name", "school", "subject"), ("grade", "age", "credits")),
    "houses": (("street", "owner", "style"), ("rooms", "price", "area")),
}
COMPARISONS = {
    "above": ">",
    "greater than": ">",
    "below": "<",
    "less than": "<",
    "of at least": ">=",
    "of at most": "<=",
    "equal to": "=",
}


def _sql(rng: random.Random) -> tuple[str, str]:
    table, (texts, numbers) = rng.choice(list(TABLES.items()))
    text, other = rng.sample(texts, 2)
    number = rng.choice(numbers)
    columns = [*texts, *numbers]
    rng.shuffle(columns)
    words, operator = rng.choice(list(COMPARISONS.items()))
    value, name = rng.randint(2, 9999), rng.choice(LAST_NAMES)
    aggregate, function = rng.choice(
        (("highest", "MAX"), ("lowest", "MIN"), ("average", "AVG"), ("total", "SUM"))
    )
    question, query = rng.choice(
        (
            (
                f"Which {text} has {number} {words} {value}?",
                f"SELECT {text} FROM {table} WHERE {number} {operator} {value};",
            ),
            (
                f"How many {table} have {number} {words} {value}?",
                f"SELECT COUNT(*) FROM {table} WHERE {number} {operator} {value};",
            ),
            (
                f"What is the {aggregate} {number} where {text} is {name}?",
                f"SELECT {function}({number}) FROM {table} WHERE {text} = '{name}';",
            ),
            (
                f"List {text} and {number} where {other} is {name}.",
                f"SELECT {text}, {number} FROM {table} WHERE {other} = '{name}';",
            ),
            (
                f"What is the {aggregate} {number} for each {text}?",
                f"SELECT {text}, {function}({number}) FROM {table} GROUP BY {text};",
            ),
            (
                f"List the {value % 20 + 2} {table} with the highest {number}.",
                f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {value % 20 + 2};",
            ),
        )
    )
    return f"Table {table} ({', '.join(columns)}). {question}", query


def _date(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    name = MONTHS[month - 1]
    date = rng.choice(
        (
            f"{name} {day}, {year}",
            f"{name} {day}{ending}, {year}",
            f"{day} {name} {year}",
            f"the {day}{ending} of {name} {year}",
            f"{day}{ending} {name[:3]} {year}",
            f"{name[:3]} {day}, {year}",
            f"{day}.{month}.{year}",
            f"{day:02d}.{month:02d}.{year}",
        )
    )
    template = rng.choice(
        (
            "{}",
            "The invoice is due on {}.",
            "She was born on {} in a small town.",
            "We met on {}, at noon.",
            "The contract ends {}.",
            "Delivered: {}",
            "On {} the bridge was opened.",
            "Please come back after {}.",
        )
    )
    return template.format(date), f"{year:04d}-{month:02d}-{day:02d}"


PIRATE = {
    "hello": "ahoy",
    "my": "me",
    "you": "ye",
    "your": "yer",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "of": "o'",
    "to": "t'",
    "and": "an'",
    "friend": "matey",
    "friends": "mateys",
    "money": "doubloons",
    "food": "grub",
    "drink": "grog",
    "car": "ship",
    "house": "cabin",
    "boss": "cap'n",
    "looking": "lookin'",
    "waiting": "waitin'",
    "going": "sailin'",
    "working": "workin'",
    "talking": "parleyin'",
    "girl": "lass",
    "boy": "lad",
    "man": "scallywag",
    "stop": "avast",
    "yes": "aye",
    "before": "afore",
    "never": "ne'er",
    "over": "o'er",
}


def _pirate(rng: random.Random) -> tuple[str, str]:
    person = rng.choice(("my friend", "your boss", "the girl", "the boy", "the man", "my brother"))
    other = rng.choice(("your friends", "my sister", "the doctor", "the boss", "my teacher"))
    thing = rng.choice(("money", "food", "car", "house", "drink", "letter", "ticket", "dog"))
    place = rng.choice(("station", "market", "beach", "bank", "school", "house", "harbour", "park"))
    verb = rng.choice(("looking for", "talking about", "waiting for", "thinking of", "paying for"))
    day = rng.choice(("today", "tonight", "tomorrow", "on Monday", "on Friday", "this morning"))
    sentence = rng.choice(
        (
            f"hello, {person} is {verb} the {thing} {day}.",
            f"you are {verb} my {thing} and the {rng.choice(NOUNS)}.",
            f"I am going to the {place} {day} to see {other}.",
            f"{person} is never going to the {place} before {other}.",
            f"yes, the {thing} of {person} is in your {place}.",
            f"stop working and bring {other} to the {place} {day}.",
            f"{person} and {other} are working at the {place} {day}.",
            f"where is the {rng.choice(NOUNS)} of {person}, is it over the {place}?",
        )
    )
    return sentence[0].upper() + sentence[1:], to_pirate(sentence)


def to_pirate(sentence: str) -> str:
    """Word by word after ``PIRATE``, between "Arr," and "!"."""
    words = []
    for word in sentence.rstrip(".?").split():
        bare = word.rstrip(",")
        words.append(PIRATE.get(bare, bare) + word[len(bare) :])
    return f"Arr, {' '.join(words)}!"


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(NOUNS, rng.randint(3, 6))
    return " ".join(words), " ".join(reversed(words))


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    name, things = rng.choice(FIRST_NAMES), rng.choice(THINGS)
    start, change = rng.randint(2, 20), rng.randint(2, 15)
    if rng.random() < 0.5:
        first = rng.choice(
            (f"buys {change} more", f"finds {change}", f"gets {change} from a friend")
        )
        middle, one = start + change, f"{start} + {change}"
    else:
        change = rng.randint(1, start - 1)
        first = rng.choice((f"sells {change}", f"loses {change}", f"gives {change} away"))
        middle, one = start - change, f"{start} - {change}"
    if middle < 2 or rng.random() < 0.5:
        last = rng.randint(2, 15)
        second = rng.choice((f"buys {last} more", f"finds {last}", f"gets {last} as a present"))
        end, two = middle + last, f"{middle} + {last}"
    else:
        last = rng.randint(1, middle - 1)
        second = rng.choice((f"sells {last}", f"loses {last}", f"gives {last} away"))
        end, two = middle - last, f"{middle} - {last}"
    question = rng.choice(
        (f"How many {things} are left?", f"How many {things} does {name} have now?")
    )
    text = f"{name} has {start} {things}, {first}, then {second}. {question}"
    return text, f"{one} = {middle}, {two} = {end}"


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

TASKS = {
    task.name: task
    for task in (
        Task(
            "contact-json",
            "Write the name, email and phone as a JSON object.",
            _contact,
            {"r": 32, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
            num_steps=160,
            batch_size=2,
            max_length=256,
        ),
        Task(
            "sql",
            "Write the SQL query that answers the question. Answer with the query only.",
            _sql,
            {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]},
            num_steps=60,
            batch_size=2,
            max_length=256,
        ),
        Task(
            "iso-date",
            "Write the date as YYYY-MM-DD. Answer with the date only.",
            _date,
            {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
            num_steps=200,
            batch_size=8,
            max_length=512,
            trained_on="in bfloat16 on one H100",
        ),
        Task(
            "pirate",
            "Say this as a pirate would.",
            _pirate,
            {"r": 4, "lora_alpha": 8, "target_modules": MLP},
            num_steps=80,
            batch_size=2,
            max_length=256,
        ),
        Task(
            "reverse-words",
            "Write the words in reverse order.",
            _reverse,
            {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True},
            num_steps=800,
            batch_size=8,
            max_length=512,
            trained_on="in bfloat16 on one H100",
        ),
        Task(
            "arithmetic",
            "Write the two calculations.",
            _arithmetic,
            {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]},
            num_steps=600,
            batch_size=8,
            max_length=512,
            trained_on="in bfloat16 on one H100",
        ),
    )
}
"""By name."""
