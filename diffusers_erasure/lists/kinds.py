"""What kind of thing the entries of the shipped lists of objects are, and which of them are the same thing.

Written from general knowledge; no list of others was copied. An automatic anchor is of the kind of its target: text encoders put
words near each other for many reasons, and no thing may come out as one of another kind.
"""

from functools import lru_cache

from . import _plain_words, read_list


# By kind. Those joined by a stroke are one thing, or kinds of it: none of them is an anchor for another.
_ENTRIES = {
    "mammal": "alpaca/llama, anteater, antelope/gazelle, armadillo, baboon, badger, bat, bear/polar bear, beaver, "
    "bison/water buffalo/yak, bull/cow/calf, camel, cat/kitten, cheetah, chimpanzee, chipmunk, coyote, deer/fawn/reindeer/moose, "
    "dog/puppy/dachshund/golden retriever/husky/poodle, donkey/mule, elephant, ferret/weasel, fox, giant panda/panda, giraffe, goat, "
    "gorilla, guinea pig, hamster, hare/rabbit, hedgehog, hippopotamus, horse/foal/pony, hyena, jackal, jaguar, kangaroo, koala, "
    "lemur, leopard/snow leopard, lion/lioness, lynx, meerkat, mole, monkey, mouse/rat, opossum, orangutan, otter, pig/piglet, "
    "platypus, porcupine, puma, raccoon, red panda, rhinoceros, sheep/lamb, skunk, sloth, squirrel, tiger, wild boar, wolf, wombat, zebra",
    "bird": "albatross, blackbird, canary, chicken/chick/rooster/hen, cockatoo, crow/raven, dove/pigeon, duck/duckling, eagle, emu, "
    "falcon, flamingo, goose, hawk, heron, hummingbird, kingfisher, magpie, ostrich, owl/barn owl, parrot/macaw, peacock, pelican, "
    "penguin, puffin, robin, seagull, sparrow, stork, swallow, swan, toucan, turkey, vulture, woodpecker",
    "sea animal": "carp, clownfish, crab, dolphin, eel, fish, goldfish, jellyfish, lobster, manatee, octopus/squid, orca/whale, oyster, "
    "pufferfish, salmon, sea lion/seal, sea urchin, seahorse, shark, shrimp, starfish, stingray, trout, tuna, walrus",
    "insect": "ant, bee, beetle, butterfly/moth, caterpillar, centipede, cricket/grasshopper, dragonfly, firefly, fly, ladybug, "
    "mosquito, praying mantis, scorpion, spider, wasp",
    "reptile": "alligator/crocodile, chameleon, cobra/snake, dinosaur, dragon, earthworm, frog/toad, gecko/lizard/iguana, salamander, "
    "slug/snail, turtle/tortoise/sea turtle",
    "person": "baby, boy/man, face, girl/woman, hand",
    "fruit": "apple, apricot, avocado, banana, blackberry, blueberry, cherry, coconut, fig, grape/grapes, grapefruit, kiwi, lemon, lime, "
    "mango, melon, orange, papaya, peach, pear, pineapple, plum, pomegranate, raspberry, strawberry, watermelon",
    "vegetable": "artichoke, asparagus, beetroot, bell pepper, broccoli, cabbage, carrot, cauliflower, chili pepper, clove of garlic, "
    "corn/ear of corn, cucumber, eggplant, leek, lettuce, mushroom/toadstool, onion, pea pod, potato, pumpkin, radish, tomato, zucchini",
    "nut": "acorn, almond, chestnut, peanut, pine cone, walnut",
    "dish": "boiled egg/fried egg/egg/omelette, bowl of cereal, bowl of ramen, bowl of rice, bowl of soup/soup, burrito/taco, dumpling, "
    "hamburger, hot dog/sausage, lasagna, pizza, plate of spaghetti, roast chicken, salad, sandwich, steak, sushi roll",
    "bread": "bagel, baguette/bread/loaf of bread/slice of toast, croissant, pretzel, block of cheese/cheese, stick of butter, "
    "jar of honey, jar of jam",
    "sweet": "apple pie, birthday cake/cake/wedding cake, bag of popcorn, candy cane, cheesecake, chocolate bar, cookie, "
    "cupcake/muffin, donut/doughnut, gingerbread house, ice cream/ice cream cone, lollipop, pancake, waffle",
    "drink": "cocktail, cup of coffee, cup of tea/tea, glass of milk, glass of orange juice, milkshake",
    "flower": "bouquet, carnation, daffodil, daisy, dandelion, flower, hibiscus, hydrangea, iris, lavender plant, lily/water lily, "
    "lotus flower, orchid, peony, poppy, rose, sunflower, tulip/tulip field, wreath",
    "plant": "aloe vera plant, autumn leaf/leaf, bamboo, cactus, clover, fern, grass, hedge, houseplant, ivy",
    "tree": "baobab tree, birch tree, bonsai tree, cherry tree, christmas tree, maple tree, oak tree, olive tree, palm tree, pine tree, "
    "redwood tree, tree, tree stump, willow tree",
    "car": "ambulance, bus/double-decker bus/school bus, camper van, car/convertible/sports car/vintage car, delivery van, fire truck, "
    "garbage truck, pickup truck/truck, police car, taxi",
    "vehicle": "bicycle, bulldozer, cable car, combine harvester, construction crane, excavator, forklift, freight train/train/"
    "high-speed train/steam locomotive/subway train, horse-drawn carriage, lawn mower, motorcycle, rickshaw, scooter, shopping cart, "
    "sled, stroller, tractor, tram, tricycle, unicycle, wheelbarrow, wheelchair",
    "ship": "boat/fishing boat/motorboat/rowboat, canoe/kayak, container ship/ship, cruise ship, ferry, gondola, raft, sailboat/yacht, "
    "shipwreck, submarine, tugboat",
    "aircraft": "airplane/biplane/jet plane, airship, glider, helicopter, hot air balloon, parachute, rocket/space shuttle, satellite",
    "instrument": "accordion, bagpipe, banjo, bell, cello/violin, church organ, clarinet, drum/drum kit, electric guitar/guitar, flute, "
    "harmonica, harp, music box, piano, saxophone, tambourine, trombone, trumpet, tuba, ukulele, xylophone",
    "clothing": "apron, baseball cap, belt, beret, boot, bow tie, coat/overcoat, cowboy hat/hat/straw hat, dress, evening gown, glove, "
    "helmet, high-heeled shoe, hoodie, jacket, kimono, mask, mitten, necktie, oven mitt, pair of jeans, raincoat, sandal, scarf, shirt, "
    "shoe, skirt, slipper, sneaker, sock, suit, suit of armor, sweater, t-shirt, top hat, wedding dress, wig, boxing glove",
    "accessory": "backpack, bag/handbag/purse, bracelet, briefcase, brooch, crown, earring, folding fan, medal, necklace, "
    "pair of binoculars, pair of glasses/pair of sunglasses, pair of headphones, paper bag, pocket watch/watch/wristwatch, ring, suitcase, "
    "umbrella/beach umbrella, walking stick, wallet, crutch, feather",
    "tool": "abacus, anvil, axe, broom/mop, bucket, button, chain, compass, dustpan, electric drill, fishing rod, garden hose, hammer, "
    "hoe, hook, key, knitting needle, ladder, loom, magnifying glass, microscope, nail/screw, needle, oar, padlock, pair of pliers, "
    "pair of scissors/scissors, rake, rope, ruler, saw, screwdriver, sewing machine, shield, shovel, spool of thread, steering wheel, "
    "ship's wheel, stethoscope, sword, syringe, telescope, thermometer, watering can, wrench, lifebuoy, anchor, bow and arrow, sundial, "
    "hourglass, horseshoe, horse saddle, car tire, dog collar, ball of yarn",
    "kitchenware": "baking tray, blender, bottle/beer bottle/water bottle, bowl, cheese grater, chopstick, coffee machine, "
    "coffee mug/cup/teacup, colander, corkscrew, cutting board, fork, frying pan/saucepan/wok, jug/pitcher, kettle/teapot, "
    "kitchen knife/knife, ladle, lunch box, microwave oven, napkin, pepper mill, plate, rolling pin, salt shaker, spatula, spoon, "
    "thermos, toaster, whisk, wine glass",
    "household thing": "balloon, bandage, banknote, bar of soap, barrel, cardboard box/box, comb, hairbrush, hair dryer, clothes iron, "
    "coin, electric fan, flag, globe, gold bar, ironing board, mirror, paper clip, picture frame, piggy bank, razor, sponge, "
    "tablecloth, toothbrush, towel, trash can, treasure chest, trophy, vacuum cleaner, vase/flowerpot, washing machine, "
    "dishwasher, wicker basket, wooden crate, fruit basket, bird cage, fishbowl, crystal, diamond, statue, snowman, scarecrow, ghost, "
    "glass marble, faucet, fire hydrant, parking meter, mailbox, doorbell, doormat, ball, sink, shower, toilet, bathtub, stove, "
    "refrigerator, radiator, fireplace",
    "light": "alarm clock/clock/grandfather clock, candle, candlestick, chandelier, desk lamp/floor lamp/lamp, flashlight, lantern, "
    "light bulb, street lamp, traffic light, campfire/bonfire, firework",
    "furniture": "armchair/chair/rocking chair, bed/bunk bed, bench/park bench, bookshelf, carpet, chest of drawers, coffee table/table/"
    "dining table, cradle, cupboard/wardrobe, curtain, desk, blanket/quilt, hammock, mattress, pillow, sleeping bag, sofa, stool, tent",
    "device": "calculator, camera, cassette tape, computer/desktop computer/laptop, computer keyboard, computer mouse, loudspeaker, "
    "microphone, movie projector, phone/rotary telephone/smartphone, printer, radio, record player, satellite dish, television, "
    "typewriter, robot",
    "stationery": "book/notebook, calendar, chalkboard, crayon, deck of cards/playing card, easel, envelope, eraser, fountain pen, "
    "magazine/newspaper, map, mosaic, paintbrush, painting, pencil, postage stamp, postcard, stapler, signpost, stop sign, obelisk, "
    "totem pole",
    "toy": "billiard table, board game, chess board/chess piece, dartboard, doll/puppet, dollhouse, domino, jigsaw puzzle, kite, "
    "rocking horse, sandcastle, seesaw, slide, spinning top, swing, teddy bear, toy block, toy car, toy train, trampoline, yo-yo, "
    "carousel, ferris wheel, roller coaster",
    "sports gear": "baseball bat, basketball, bowling ball, golf club, hockey stick, ice skate/roller skate, skateboard, ski/snowboard, "
    "soccer ball, surfboard, tennis ball, tennis racket",
    "building": "airport, apartment building, art gallery, bakery, barn, bookstore, brick wall, bridge/covered bridge/suspension bridge, "
    "building, café, castle, cathedral/church, circus tent, concert hall, cottage, factory, farm/farmhouse, fortress, garage, "
    "garden shed, gas station, gate, greenhouse, hospital, hotel, house, hut, igloo, library, lighthouse, log cabin, mansion, market, "
    "monastery, mosque, museum, pagoda, palace, phone booth, picket fence, power plant, pyramid, railway station, restaurant, ruin, "
    "school, skyscraper, stadium, supermarket, synagogue, temple, theater, tower, treehouse, triumphal arch, tunnel, university, "
    "water tower, watermill, wind turbine/windmill, workshop, birdhouse, doghouse, dam, fountain, well, beehive",
    "room": "attic, balcony, ballroom, basement, bathroom, bedroom, classroom, dining room, hallway, kitchen, laboratory, living room, "
    "office, throne room, waiting room, wine cellar, door, stained glass window/window, staircase",
    "place": "amusement park, bamboo forest, beach, canyon, cave, cemetery, city, city park, city skyline, city street/street, cliff, "
    "cobblestone alley, coral reef, country road/road/highway, desert, fishing village/village, fjord, forest, garden, geyser, "
    "glacier, harbor, hill, hot spring, island/tropical island, lake/mountain lake, meadow, mountain/snowy peak, oasis, ocean wave, "
    "orchard, parking lot, pasture, playground, pond/puddle, railway track, rainforest, rice terrace, river/stream, rock, sand dune, "
    "savanna, swamp, swimming pool, town square, tundra, valley, vineyard, volcano, waterfall, wheat field",
    "sky": "cloud, comet, crescent moon/moon/full moon, foggy morning, galaxy, iceberg, icicle, lightning bolt, planet, rainbow, "
    "raindrop, snow, snowflake, snowstorm, solar eclipse, star, starry sky, sun, sunrise/sunset, thunderstorm, tornado",
    "remains": "bird's nest, dinosaur skeleton, fossil, seashell, spider web",
}
# What is tried where a kind has nothing to offer.
_WIDER = (
    ("mammal", "bird", "sea animal", "insect", "reptile"),
    ("fruit", "vegetable", "nut"),
    ("dish", "bread", "sweet", "drink"),
    ("flower", "plant", "tree"),
    ("car", "vehicle", "ship", "aircraft"),
    ("clothing", "accessory"),
    (
        "tool",
        "kitchenware",
        "household thing",
        "light",
        "furniture",
        "device",
        "stationery",
        "toy",
        "sports gear",
        "accessory",
    ),
    ("building", "room", "place"),
)
# Words for a whole kind: they hold everything of it.
BROAD = frozenset(
    (word,)
    for text in (
        "animal, beast, bird, mammal, pet, insect, bug, reptile, person, people, human, fruit, vegetable, food, meal, dish, snack, "
        "dessert, sweet, drink, plant, flower, tree, vehicle, ship, aircraft, instrument, clothing, clothes, accessory, tool, furniture, device, "
        "machine, stationery, toy, building, room, place, landscape, thing, object, item, style, art, artwork, picture, image, photo",
    )
    for word in text.split(", ")
) | {("sea", "animal"), ("musical", "instrument")}

Words = tuple[str, ...]


@lru_cache(maxsize=1)
def _table() -> dict[Words, tuple[str, frozenset[Words]]]:
    """For each entry its kind, and what is the same thing."""
    found = {}
    for kind, text in _ENTRIES.items():
        for group in text.split(", "):
            same = frozenset(_plain_words(each) for each in group.split("/"))
            found.update(dict.fromkeys(same, (kind, same)))
    return found


@lru_cache(maxsize=1 << 14)  # of every target for every candidate
def _entry(name: str) -> tuple[str, frozenset[Words]] | None:
    """What is known of a name: of itself, of its singular, or of its last words ("tabby cat")."""
    words = _plain_words(name)
    if words in _named_characters():
        return None
    for i in range(len(words)):
        *before, last = words[i:]
        for each in dict.fromkeys((last, last.removesuffix("s"), last.removesuffix("es"))):
            if (*before, each) in _table():
                return _table()[(*before, each)]
    return None


@lru_cache(maxsize=1)
def _named_characters() -> frozenset[Words]:
    return frozenset(map(_plain_words, read_list("characters")))


def kind_of(name: str) -> str | None:
    """The kind of thing that a name is known to be, such as `"mammal"`."""
    found = _entry(name)
    return None if found is None else found[0]


def wider_kinds(kind: str) -> frozenset[str]:
    """A kind and those next to it."""
    return frozenset({kind}.union(*(kinds for kinds in _WIDER if kind in kinds)))


def are_the_same(one: str, other: str) -> bool:
    """Whether two names are known to be of the same thing, or one of a kind of the other ("kitten" and "cat")."""
    found, also = _entry(one), _entry(other)
    return found is not None and also is not None and found[1] == also[1]


def is_broad(name: str) -> bool:
    """Whether a name is that of a whole kind of things ("animal")."""
    words = _plain_words(name)
    return words in BROAD or (*words[:-1], words[-1].removesuffix("s")) in BROAD if words else False
