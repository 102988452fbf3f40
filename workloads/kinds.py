"""The kinds of records that Text2JSON documents hold: names, fields, and the phrases that state them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from aquifer.workloads.prose import coined_word, date, digits, letters
from aquifer.workloads.tasks import Split

Value = Callable[[random.Random, Split], str]


@dataclass(frozen=True)
class Field:
    """One string field of a record and the verb phrases that state it; the last phrase is held out."""

    key: str
    value: Value
    clauses: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of record: a name and exactly two more fields. The last head (noun phrase) is held out."""

    singular: str
    plural: str
    pronoun: str
    name: Value
    heads: tuple[str, ...]
    fields: tuple[Field, Field]


def _full_name(rng: random.Random, split: Split) -> str:
    return f"{coined_word(rng, split)} {coined_word(rng, split)}"


def _numbered(rng: random.Random, split: Split) -> str:
    return f"{coined_word(rng, split)} {rng.randint(10, 999)}"


def _place(rng: random.Random, split: Split) -> str:
    word = coined_word(rng, split)
    return f"{rng.choice(('Port', 'New', 'Upper', 'East'))} {word}" if rng.random() < 0.2 else word


def _code(shape: str) -> Value:
    """Random codes of one shape: `A` stands for a letter, `9` for a digit, the rest for itself."""

    def draw(rng: random.Random, split: Split) -> str:
        return "".join(letters(rng, 1) if c == "A" else digits(rng, 1) if c == "9" else c for c in shape)

    return draw


def _amount(rng: random.Random, split: Split) -> str:
    return f"{rng.randint(2, 989)},{digits(rng, 3)} {rng.choice(('EUR', 'USD', 'CHF'))}"


def _date(rng: random.Random, split: Split) -> str:
    return date(rng)


KINDS: tuple[Kind, ...] = (
    Kind(
        "person",
        "persons",
        "she",
        _full_name,
        (
            "{}",
            "the resident {}",
            "a person named {}",
            "the citizen {}",
            "Ms {}",
            "resident {}",
            "a resident called {}",
        ),
        (
            Field("city", _place, ("lives in {}", "comes from {}", "has a house in {}", "resides in {}")),
            Field(
                "badge",
                _code("A9-9999"),
                ("carries badge {}", "has badge {}", "wears badge {}", "owns badge {}"),
            ),
        ),
    ),
    Kind(
        "patient",
        "patients",
        "he",
        _full_name,
        ("patient {}", "the patient {}", "a patient named {}", "Mr {}", "patient Mr {}"),
        (
            Field(
                "ward",
                _code("A-999"),
                ("lies in ward {}", "was moved to ward {}", "stays in ward {}", "rests in ward {}"),
            ),
            Field(
                "drug",
                coined_word,
                ("receives {} every day", "was given {}", "takes {}", "is treated with {}"),
            ),
        ),
    ),
    Kind(
        "shipment",
        "shipments",
        "it",
        _numbered,
        ("shipment {}", "the shipment {}", "a shipment called {}", "shipment no. {}"),
        (
            Field(
                "port",
                _place,
                ("left the port of {}", "was loaded in {}", "sailed from {}", "departed from {}"),
            ),
            Field(
                "container",
                _code("AAAA999999"),
                (
                    "travels in container {}",
                    "is packed in container {}",
                    "fills container {}",
                    "uses container {}",
                ),
            ),
        ),
    ),
    Kind(
        "contract",
        "contracts",
        "it",
        _code("CT-99999"),
        ("contract {}", "the contract {}", "an agreement filed as contract {}", "contract number {}"),
        (
            Field(
                "party",
                _full_name,
                ("was signed by {}", "binds {}", "was closed with {}", "was agreed with {}"),
            ),
            Field("amount", _amount, ("is worth {}", "covers {}", "promises {}", "is valued at {}")),
        ),
    ),
    Kind(
        "incident",
        "incidents",
        "it",
        _code("INC-9999-A"),
        ("incident {}", "the incident {}", "an event logged as incident {}", "incident number {}"),
        (
            Field(
                "place", _place, ("happened in {}", "was seen near {}", "took place in {}", "occurred in {}")
            ),
            Field(
                "date", _date, ("was reported on {}", "was logged on {}", "is dated {}", "was filed on {}")
            ),
        ),
    ),
    Kind(
        "vehicle",
        "vehicles",
        "it",
        _numbered,
        ("vehicle {}", "the vehicle {}", "a vehicle of type {}", "vehicle model {}"),
        (
            Field(
                "owner",
                _full_name,
                ("belongs to {}", "is driven by {}", "was bought by {}", "is owned by {}"),
            ),
            Field(
                "plate",
                _code("AAA-999-AA"),
                ("has the plate {}", "bears plate {}", "shows plate {}", "carries plate {}"),
            ),
        ),
    ),
    Kind(
        "flight",
        "flights",
        "it",
        _code("AA9999"),
        ("flight {}", "the flight {}", "a plane flying as {}", "flight number {}"),
        (
            Field("destination", _place, ("flies to {}", "lands in {}", "is bound for {}", "goes to {}")),
            Field(
                "pilot",
                _full_name,
                (
                    "is flown by captain {}",
                    "has captain {} on board",
                    "is led by captain {}",
                    "obeys captain {}",
                ),
            ),
        ),
    ),
    Kind(
        "book",
        "books",
        "it",
        _full_name,
        ("the book {}", "a book titled {}", "the volume {}", "a book called {}"),
        (
            Field(
                "author",
                _full_name,
                ("was written by {}", "is a work of {}", "came from the pen of {}", "is by {}"),
            ),
            Field(
                "shelf",
                _code("A99.99"),
                ("stands on shelf {}", "is kept on shelf {}", "was put on shelf {}", "is on shelf {}"),
            ),
        ),
    ),
    Kind(
        "sample",
        "samples",
        "it",
        _code("S-999999"),
        ("sample {}", "the sample {}", "a probe kept as sample {}", "sample number {}"),
        (
            Field(
                "site",
                _place,
                ("was taken in {}", "was drawn near {}", "was found in {}", "was collected in {}"),
            ),
            Field(
                "mass",
                lambda rng, split: f"{digits(rng, 2)}.{digits(rng, 3)} g",
                ("weighs {}", "has a mass of {}", "measures {}", "comes to {}"),
            ),
        ),
    ),
    Kind(
        "server",
        "servers",
        "it",
        _numbered,
        ("server {}", "the server {}", "a machine named {}", "server node {}"),
        (
            Field(
                "region",
                _place,
                ("runs in region {}", "is hosted in region {}", "serves region {}", "sits in region {}"),
            ),
            Field(
                "serial",
                _code("99AA-9999-A"),
                ("has serial {}", "bears serial {}", "is marked with serial {}", "shows serial {}"),
            ),
        ),
    ),
    Kind(
        "invoice",
        "invoices",
        "it",
        _code("R99-99999"),
        ("invoice {}", "the invoice {}", "a bill sent as invoice {}", "invoice number {}"),
        (
            Field(
                "supplier", _full_name, ("was sent by {}", "came from {}", "was issued by {}", "is from {}")
            ),
            Field("total", _amount, ("asks for {}", "demands {}", "adds up to {}", "amounts to {}")),
        ),
    ),
)
