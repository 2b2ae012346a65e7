"""The words that the tutor's texts are made of.

Requests, notes and continuations of the six levels share no telling word with the levels' names,
and requests none with the verbs that open the notes, so that following a request takes reading it.
"""

from sae_query_steer.bloom import BloomLevel

NAMES = (
    *("Mia", "Leo", "Ana", "Tom", "Eva", "Max", "Ida", "Ben", "Zoe", "Sam", "Lea", "Jon"),
    *("Amy", "Dan", "Kim", "Ray"),
)

NOUNS = (
    *("river", "wind", "sea", "forest", "bridge", "city", "engine", "cell", "leaf", "star"),
    *("planet", "island", "mountain", "storm", "market", "poem", "song", "battle", "king", "law"),
    *("map", "machine", "lens", "magnet", "metal", "crystal", "desert", "valley", "harbor"),
    *("castle", "tower", "garden", "insect", "whale", "horse", "seed", "root", "flame"),
    *("glacier", "volcano"),
)

THINGS = (
    *("rivers", "winds", "seas", "forests", "bridges", "cities", "engines", "cells"),
    *("leaves", "stars", "planets", "islands", "mountains", "storms", "markets", "poems"),
    *("songs", "battles", "kings", "laws", "maps", "machines", "lenses", "magnets"),
    *("metals", "crystals", "deserts", "valleys", "harbors", "castles", "towers", "gardens"),
    *("insects", "whales", "horses", "seeds", "roots", "flames", "glaciers", "volcanoes"),
)
"""What the notes are about."""

ADJECTIVES = (
    *("old", "young", "small", "large", "cold", "warm", "bright", "dark", "heavy", "light"),
    *("fast", "slow", "deep", "high", "dry", "wet", "soft", "hard", "quiet", "loud", "rough"),
    *("smooth", "strong", "weak"),
)

ACTIONS = {
    **{"move": "moves", "shape": "shapes", "cool": "cools", "feed": "feeds", "turn": "turns"},
    **{"protect": "protects", "damage": "damages", "reach": "reaches"},
}
"""What one thing of a lesson does to the other, and how it is said of one."""

GREETINGS = ("Hello", "Hi", "Dear", "Thanks")

READ_OUTS = ("now take", "please take", "first take", "next take")
"""The prompt's last words: they say nothing of the level."""

OPENERS = (
    "This time, help the student to",
    "In your answer, get the student to",
    "I want the student to",
    "The class is ready to",
    "Ask the student to",
    "The task for today is to",
    "It would be good to",
    "It is time to",
)

REQUESTS = {
    BloomLevel.REMEMBER: (
        "bring back the plain facts",
        "say again what was learned",
        "fetch the facts from memory",
        "tell what the book says",
        "hold on to the dates and terms",
        "look up what was said in class",
        "keep the basics in mind",
        "go over the words by heart",
    ),
    BloomLevel.UNDERSTAND: (
        "grasp what it means",
        "put it in plain words",
        "see the main idea",
        "get the sense of it",
        "make the meaning clear",
        "tell what the idea is about",
        "find the point of it",
        "follow the thread of the idea",
    ),
    BloomLevel.APPLY: (
        "put the idea to work",
        "try it on a new case",
        "carry it over to real life",
        "do it with other numbers",
        "take the rule into the lab",
        "make the method run",
        "bring the rule to a new place",
        "work through a fresh problem",
    ),
    BloomLevel.ANALYZE: (
        "take it apart",
        "look at how the pieces fit",
        "see what hangs on what",
        "pull the causes from the effects",
        "find what is hidden under it",
        "trace each link",
        "go into the inner workings",
        "hold two sides next to each other",
    ),
    BloomLevel.EVALUATE: (
        "weigh both sides",
        "say how good it is",
        "take a stand and back it",
        "tell if it can be trusted",
        "find the weak spot",
        "set a mark on the work",
        "decide what is worth most",
        "check it against a standard",
    ),
    BloomLevel.CREATE: (
        "come up with something new",
        "make a thing of their own",
        "dream up another way",
        "bring new ideas together",
        "start from an empty page",
        "think of what nobody has tried",
        "give shape to a fresh idea",
        "turn it into something else",
    ),
}

CONTINUATIONS = {
    BloomLevel.REMEMBER: (
        "What are the {noun} called?",
        "Say the three facts about the {noun} again.",
        "Where did you read about the {noun}?",
        "When were the {noun} first seen?",
    ),
    BloomLevel.UNDERSTAND: (
        "What do the {noun} mean to you?",
        "Say in your own words what the {noun} do.",
        "How would you tell a friend about the {noun}?",
        "What is the main idea behind the {noun}?",
    ),
    BloomLevel.APPLY: (
        "Try the same steps on the {topic}.",
        "Then put the {noun} to work at home.",
        "Which problem could the {noun} help with?",
        "Work out the next case with the {noun}.",
    ),
    BloomLevel.ANALYZE: (
        "Which parts do the {noun} have?",
        "How do the pieces of the {noun} fit together?",
        "What causes the {noun} to change?",
        "Where do the {noun} and the {topic} differ?",
    ),
    BloomLevel.EVALUATE: (
        "Are the {noun} better than the {topic}, and why?",
        "How sure can you be about the {noun}?",
        "Which reason for the {noun} is the strongest?",
        "Would you trust the {noun}?",
    ),
    BloomLevel.CREATE: (
        "Imagine {noun} that nobody has seen.",
        "What would a new kind of {noun} look like?",
        "Make your own {noun} and show them to the class.",
        "Write a short story in which the {noun} meet the {topic}.",
    ),
}

CORRECTION = "You wrote {wrong}, but the {topic} is {right}."
