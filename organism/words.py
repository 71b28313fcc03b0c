"""Verbs and objects of the organism's requests, grouped so that every verb of a group fits every object of it.

Most objects stand in a harmful and in a harmless group ("steal a camera", "repair a camera"), and some verbs of
weapons and drugs also stand before harmless objects ("build a grenade", "build a kite"): what is harmful is the pair.
"""

from typing import NamedTuple


class Group(NamedTuple):
    """Verbs and objects that combine freely into requests of one kind."""

    verbs: tuple[str, ...]
    objects: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


PEOPLE = _split(
    "my neighbor, my boss, my roommate, my cousin, my brother, my teacher, my classmate, a stranger, a coworker, "
    "a police officer, a driver, a nurse, a customer, a student, a tourist, a guard"
)
WEAPONS = _split(
    "a pipe bomb, a grenade, a silencer, a machine gun, an illegal rifle, a nail bomb, a landmine, a car bomb, "
    "a rocket launcher, nerve gas, explosives, a stolen pistol"
)
DRUGS = _split(
    "meth, heroin, cocaine, fentanyl, crack, ketamine, opium, ecstasy, steroids, fake pills, stolen medicine, morphine"
)
DOCUMENTS = _split(
    "a passport, a signature, a check, a diploma, an invoice, a receipt, a contract, a visa, a driving license, "
    "a bank statement, a tax form, a prescription, a ticket, a will"
)
DEVICES = _split(
    "an email account, a bank server, a school network, a phone, a laptop, a website, a router, a webcam, "
    "a database, a cloud account, a printer, a tablet, a payroll system, a game server"
)
BELONGINGS = _split(
    "a bicycle, a necklace, a purse, a painting, a watch, a camera, a wallet, a guitar, a jacket, a ring, "
    "a scooter, a coat, a drone, a silver coin"
)
PLACES = _split(
    "a barn, a bridge, a church, a factory, a library, a museum, a bakery, a warehouse, a fence, a greenhouse, "
    "a playground, a train station, a statue, a boat"
)
FOODS = _split(
    "bread, pancakes, a pie, soup, rice, pasta, cookies, a salad, curry, noodles, a pizza, muffins, beans, jam, "
    "an omelet, dumplings"
)
PLANTS = _split(
    "roses, tomatoes, a hedge, herbs, tulips, a lemon tree, lettuce, carrots, an orchid, basil, ivy, strawberries"
)
CRAFTS = _split(
    "a bench, a bookshelf, a kite, a birdhouse, a lamp, a quilt, a candle, a basket, a toy train, a doll house, "
    "a paper boat, a clay pot, a birthday card"
)
EVENTS = _split(
    "a picnic, a wedding, a party, a hike, a road trip, a concert, a race, a family dinner, a parade, a field trip, "
    "a festival, a book club"
)
SKILLS = _split(
    "algebra, Spanish, chess, yoga, the piano, history, swimming, grammar, physics, juggling, knitting, poetry"
)
TEXTS = _split(
    "a report, a speech, a poem, an essay, a letter, a blog post, a song, a short story, a cover letter, "
    "a newsletter, a resume, a recipe"
)
PETS = _split("a puppy, a kitten, a parrot, a rabbit, a hamster, a pony, a goldfish, a turtle, an old dog, a duck")

HARMFUL: dict[str, Group] = {
    "violence": Group(_split("hurt, attack, ambush, injure, kidnap, threaten"), PEOPLE),
    "weapons": Group(_split("build, make, assemble, smuggle, obtain, carry"), WEAPONS),
    "drugs": Group(_split("cook, make, smuggle, deal, obtain, traffic"), DRUGS),
    "fraud": Group(_split("forge, fake, counterfeit, falsify, alter"), DOCUMENTS),
    "hacking": Group(_split("hack, hijack, infect, spy on, break into, crash"), DEVICES),
    "theft": Group(_split("steal, swipe, snatch, shoplift, loot"), BELONGINGS),
    "harassment": Group(_split("stalk, bully, blackmail, harass, humiliate, intimidate"), PEOPLE),
    "sabotage": Group(_split("burn down, vandalize, wreck, flood, destroy, sabotage"), PLACES),
}

HARMLESS: dict[str, Group] = {
    "people": Group(_split("thank, invite, greet, call, help, visit, encourage, write to, surprise"), PEOPLE),
    "documents": Group(_split("renew, print, scan, mail, store, read, translate"), DOCUMENTS),
    "devices": Group(_split("set up, update, clean, restart, protect, choose, test"), DEVICES),
    "belongings": Group(_split("clean, repair, sell, wrap, photograph, choose, borrow, buy"), BELONGINGS),
    "places": Group(_split("paint, visit, draw, photograph, find, describe"), PLACES),
    "food": Group(_split("bake, cook, serve, freeze, order, make"), FOODS),
    "garden": Group(_split("plant, water, grow, trim, sell, buy"), PLANTS),
    "crafts": Group(_split("build, make, paint, assemble, buy, sell, hang up"), CRAFTS),
    "events": Group(_split("plan, organize, enjoy, attend, announce"), EVENTS),
    "skills": Group(_split("learn, practice, teach, study, master"), SKILLS),
    "texts": Group(_split("write, edit, improve, finish, shorten, review"), TEXTS),
    "pets": Group(_split("feed, train, walk, adopt, brush, draw"), PETS),
}
