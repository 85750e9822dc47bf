"""The words of the story world: who, where, with what, and how a story can end.

Nothing here decides anything; the plots do. Every list is a tuple, so that a draw by index is the same in every
process (sets would depend on hash randomisation). Names carry a pronoun, places a preposition, things a kind, and
endings a mood, because those are what the tasks ask for and what makes their answers exact.
"""

from __future__ import annotations

__all__ = [
    "BOYS",
    "CLOSINGS",
    "CONTESTS",
    "DETAILS",
    "ENDINGS",
    "FOOD_LOOKS",
    "GIRLS",
    "HOBBIES",
    "HOMES",
    "LOOKS",
    "MOODS",
    "NOISES",
    "PET_LOOKS",
    "PLACES",
    "SIDE_ACTS",
    "SKILLS",
    "SPECIES",
    "THINGS",
    "TIMES",
    "TRAITS",
    "WEATHERS",
    "words",
]


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, in order.

    >>> words("kite ball")
    ('kite', 'ball')
    """
    return tuple(text.split())


GIRLS = words(
    "Mia Anna Lily Ruth Nora Ella Rosa Clara Ivy Maya Zoe Alice Emma Grace Hana June Kate Leila Molly Nina "
    "Olive Pearl Sara Tara Uma Vera Wendy Amy Bella Cora Daisy Eva Fern Gita Holly Iris Jade Lucy Meera Sofia"
)
BOYS = words(
    "Tom Ben Sam Max Leo Jack Finn Omar Hugo Noah Adam Carl Dan Eric Felix George Harry Ivan Jonas Karl Luke "
    "Marco Nico Oscar Paul Ravi Simon Theo Victor Walt Amir Bruno Chen David Emil Frank Gus Henry Jim Ken"
)
SPECIES = words("rabbit fox bear mouse squirrel hedgehog duck owl otter badger goat frog turtle beaver deer")
TRAITS = words(
    "kind brave shy clever cheerful quiet curious gentle busy patient careful lively friendly loyal stubborn "
    "sleepy playful polite dreamy wise"
)
# What a character likes; it opens many stories.
HOBBIES = (
    "painting", "singing", "climbing trees", "reading old books", "looking at the stars",
    "collecting shells", "baking cakes", "telling jokes", "riding a bicycle", "flying kites",
    "playing the drum", "growing flowers", "drawing maps", "swimming", "watching birds", "building towers",
    "dancing", "fishing", "writing letters", "making puppets",
)  # fmt: skip

_PLACES_BY_PREPOSITION = {
    "in the": words(
        "garden park forest kitchen barn attic cellar meadow library village school castle cave valley "
        "orchard classroom bakery stable tent workshop greenhouse museum tower"
    ),
    "at the": words("market station lighthouse harbor zoo farm fair mill playground theater shop"),
    "by the": words("river lake pond well fountain waterfall gate fence stream windmill"),
    "on the": words("hill beach bridge roof boat island porch mountain balcony"),
}
PLACES = tuple((preposition, noun) for preposition, nouns in _PLACES_BY_PREPOSITION.items() for noun in nouns)
# What one can live by.
HOMES = words("park forest river lake station harbor farm mill beach hill bridge well village sea")

THINGS = {
    "toy": words("kite ball doll drum puzzle puppet balloon train robot top whistle marble sled scooter bear boat"),
    "treasure": words(
        "key ring coin shell feather necklace map bell medal crown gem watch locket mirror compass stone"
    ),
    "food": words("apple pear melon carrot peach plum banana lemon cherry turnip nut bun loaf cookie pretzel"),
    "dish": words("cake pie sandwich pancake muffin tart pizza waffle pudding stew roll omelet"),
    "tool": words("rope ladder hammer shovel lantern net bucket basket broom rake saw brush spoon wheelbarrow"),
    "rescue": words("rope ladder net bucket basket lantern pole crate"),
    "builder": words("hammer saw shovel ladder brush axe drill nail"),
    "light": words("lantern lamp candle torch broom stick"),
    "clothing": words("hat scarf coat sock mitten boot cap sweater cloak glove apron ribbon"),
    "work": words("tower house bridge fort cart bench nest wagon shelf raft chair table swing"),
    "gift": words("book flower card picture box lamp clock pillow cup vase blanket basket flute violin"),
    "pet": words("kitten puppy lamb chick pony calf bird duckling hamster piglet"),
    "plant": words("rose tree bush sunflower pumpkin bean tulip vine tomato daisy"),
}
LOOKS = words(
    "red blue green yellow little big old new shiny wooden tiny soft striped golden purple orange heavy round "
    "pretty silver long white black strange beautiful"
)
PET_LOOKS = words("little tiny brown white black spotted grey fluffy lost hungry sleepy young")
FOOD_LOOKS = words("sweet fresh big little warm tasty ripe round golden huge")

WEATHERS = words("sunny rainy windy cloudy cold warm snowy foggy bright quiet hot frosty")
TIMES = (
    "One morning", "One day", "One afternoon", "One evening", "Last summer", "Last winter", "On Monday",
    "On Friday", "On Sunday", "After lunch", "Before supper", "Early in the spring",
)  # fmt: skip
SKILLS = (
    "swim", "whistle", "skate", "ride a pony", "play the flute", "tie a knot", "bake bread", "climb a rope",
    "juggle", "read a map", "ski", "knit", "row a boat", "dance", "draw a horse", "sing a hard song",
)  # fmt: skip
CONTESTS = (
    "race", "spelling contest", "singing contest", "cooking contest", "chess game", "swimming race",
    "dance contest", "drawing contest", "sack race", "boat race",
)  # fmt: skip
NOISES = words("bang scratch thump squeak howl knock rustle creak whisper splash")

# What a bystander may do: verb and kind of thing, one pair a word.
_SIDE_ACTS = words(
    "paint:work clean:tool wash:clothing sell:dish buy:gift carry:tool water:plant feed:pet eat:food draw:pet "
    "fix:toy polish:treasure sew:clothing build:work hide:treasure drop:food count:treasure bring:gift "
    "wear:clothing cut:plant chase:pet brush:pet throw:toy push:work plant:plant see:pet choose:gift "
    "borrow:tool wrap:gift kick:toy smell:plant sweep:work mend:clothing cook:dish hold:pet"
)
SIDE_ACTS = tuple((pair.split(":")[0], pair.split(":")[1]) for pair in _SIDE_ACTS)

# Mood of the ending -> (what the hero did, how it went on). Any first half goes with any second half of its mood.
ENDINGS = {
    "happy": (
        (
            "smiled from ear to ear", "laughed out loud", "danced all the way home", "clapped with joy",
            "jumped up and down", "hugged everyone",
        ),
        (
            "sang a merry song", "could not stop smiling", "had the best day of the year",
            "skipped home in the sun", "told everyone the good news",
        ),
    ),
    "sad": (
        (
            "cried softly", "walked home with a heavy heart", "wiped away a tear", "sat alone and sighed",
            "hung {his} head", "wept for a long time",
        ),
        (
            "did not want any supper", "missed the old days", "felt very lonely",
            "wished it had gone another way", "spoke to no one that night",
        ),
    ),
    "proud": (
        (
            "stood up very tall", "held {his} head high", "showed the work to everyone", "took a deep bow",
            "puffed out {his} chest", "told the story to the whole village",
        ),
        (
            "knew that hard work pays", "had done it all alone", "felt like a champion",
            "heard everyone cheer {his} name", "wrote it down so as not to forget it",
        ),
    ),
    "scared": (
        (
            "shook like a leaf", "ran home as fast as {he} could", "hid under the bed",
            "locked the door twice", "held {his} breath in the dark", "turned pale",
        ),
        (
            "did not dare to look back", "left the lamp on all night", "heard {his} heart beat loudly",
            "never went there again at night", "could not sleep for fear",
        ),
    ),
    "calm": (
        (
            "lay down in the soft grass", "sat by the warm fire", "drank a cup of tea",
            "listened to the quiet rain", "closed {his} eyes", "leaned back and rested",
        ),
        (
            "slowly fell asleep", "breathed in and out", "watched the clouds go by", "felt at peace",
            "thought of nothing at all",
        ),
    ),
    "angry": (
        (
            "stamped {his} foot", "slammed the door", "turned red in the face", "shouted at the sky",
            "kicked a stone", "folded {his} arms",
        ),
        (
            "did not say goodbye", "would not talk to anyone", "said it was not fair",
            "frowned all the way home", "threw {his} cap on the ground",
        ),
    ),
    "surprised": (
        (
            "gasped", "rubbed {his} eyes", "stared with an open mouth", "blinked three times",
            "nearly fell over", "could hardly believe it",
        ),
        (
            "had never seen such a thing", "did not know what to say", "looked again to be sure",
            "wondered if it was a dream", "forgot to close {his} mouth",
        ),
    ),
}  # fmt: skip
MOODS = tuple(ENDINGS)

# Nothing happens in these; they make the world wider and the facts harder to find.
DETAILS = (
    "A dog barked far away.", "The air smelled of flowers.", "Birds sang in the trees.",
    "The grass was wet.", "A small wind moved the leaves.", "Two crows sat on the fence.",
    "The sky was full of clouds.", "Bees hummed.", "Somebody was singing a song.", "The old clock ticked.",
    "It smelled of fresh bread.", "The sun was high.", "The leaves were red and gold.",
    "There was nobody else around.", "A cat slept on the wall.", "Children laughed.",
    "The road was long and dusty.", "Far off, a train went by.", "A frog jumped into the water.",
    "It was very quiet.", "Everything looked the same as always.", "The wind smelled of the sea.",
    "A bell rang twelve times.", "Three geese flew over the roofs.", "The shadows were getting longer.",
    "A butterfly landed on a leaf.",
)  # fmt: skip
# Said after the ending now and then, so that the mood does not always stand in the last sentence.
CLOSINGS = (
    "Soon the moon came up.", "The stars came out one by one.", "Then it was time for bed.",
    "The day was over.", "Somewhere a bell rang.", "Nobody saw the owl in the tree.",
    "Outside, the wind was still.", "The clock struck nine.",
)  # fmt: skip
