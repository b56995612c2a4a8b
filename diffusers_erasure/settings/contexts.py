"""Many contexts of a concept, so that the probes of the gated edit know it wherever it stands.

Every fourth one is held out to set the thresholds, and every fourth to test them, so kinds of context take turns: bare, with something
before the name, behind it, and around it.
"""

OBJECTS: tuple[str, ...] = (
    *("{}", "a {}", "the {} at night", "a {} on a table"),
    *("a picture of a {}", "a photo of a {}", "{}, a painting", "my {} in bright colours"),
    *("a {} in watercolour style", "two {} together", "an image of {}", "a small {} in the garden"),
    *("a {}, artwork", "old {}", "a drawing of a {} on paper", "one {}, painted"),
    *("big {}", "{}, in colour, minimal", "a {} by a window", "a sticker of a {} in the middle of a page"),
    *("a cartoon of a {} in the manner of a child", "{} and a tree", "a {} for a birthday card", "blue {}"),
    *("a tree and a {}", "{}, black and white", "a {} by the river", "portrait of a {}, simple shapes"),
    *("vintage {}", "an icon of a {} in the corner", "a {} made of paper", "the {}, seen from above"),
    *("a group of {} in a field", "a {} under a blue sky", "close-up of a {}", "look at this {} here"),
    *("{} by an artist", "tiny {} on a white background", "a {} in modern design", "a funny {} in a book"),
)
# Behind each what is left of it where the concept is taken out.
STYLES: dict[str, str] = {
    "{}": "",
    "a house in {} style": "a house",
    "a tree, {} style": "a tree",
    "{} artwork of a boat": "artwork of a boat",
    "a picture of a chair in {} style": "a picture of a chair",
    "a woman by {}": "a woman",
    "{} lamp": "lamp",
    "a drawing of a hand in the style of {}": "a drawing of a hand",
    "{} style": "",
    "a painting of a mountain by {}": "a painting of a mountain",
    "the moon, {}": "the moon",
    "a shoe in {}": "a shoe",
    "a picture in {} style": "a picture",
    "{} chair": "chair",
    "an emoji in the style of {}": "an emoji",
    "a clock, made in {} style": "a clock",
    "clouds, {} style": "clouds",
    "a train by {}": "a train",
    "a {} picture of a street": "a picture of a street",
    "a bridge in the style of {}": "a bridge",
    "{} street": "street",
    "an apple tree in {} style": "an apple tree",
    "a small town, by {}": "a small town",
    "art in the style of {}": "art",
    "a man in {} style": "a man",
    "{} boat": "boat",
    "a beach, {} style": "a beach",
    "an image of a door by {}": "an image of a door",
    "{} house": "house",
    "a photo of an object, {} style": "a photo of an object",
    "a key in the style of {}": "a key",
    "a {} drawing": "a drawing",
}
PEOPLE: tuple[str, ...] = (
    *("{}", "a photo of {}", "{} in a garden", "{}, smiling"),
    *("a portrait of {}", "{} with a hat", "an image of {}", "a drawing of {} on paper"),
    *("{} on the red carpet", "a picture of {} and a dog", "{} as a child", "old photograph of {}"),
    *("a painting of {}", "{} speaking at a conference", "close-up of {}", "{}, black and white"),
    *("{} in a suit", "the face of {}", "{} riding a bicycle", "a statue of {}"),
    *("a film with {}", "{} at the beach", "{} in profile, studio light", "a cartoon of {}"),
)
