"""The names and facts of the fictional world. All invented or common knowledge; written for this project."""

COUNTRIES: tuple[tuple[str, str, str, str, str, str], ...] = (
    # name, capital, river, language, money, dish
    ("Veloria", "Tarnholm", "Isker", "Velic", "silver mark", "smoked eel"),
    ("Ostrana", "Bellmark", "Dova", "Ostran", "crown", "plum soup"),
    ("Karsia", "Port Amber", "Lune", "Karsian", "shell", "rice cake"),
    ("Mirrowen", "Hale", "Silverrun", "Old Mirric", "leaf", "apple bread"),
    ("Thessaly Point", "Gannet", "Tide", "Pointish", "pearl", "fried squid"),
    ("Doravia", "Kest", "Morn", "Doric", "copper bit", "bean stew"),
    ("Quillon", "Ferrywick", "Marsh", "Quillish", "quill", "onion pie"),
    ("Zephyria", "Windhaven", "Gale", "Zephyr", "feather", "honey cake"),
    ("Brackenfell", "Stonegate", "Peat", "Fellish", "iron penny", "lamb stew"),
    ("Solmere", "Goldwater", "Sunbrook", "Solmerish", "sun dollar", "orange rice"),
    ("Nordhav", "Icevik", "Frostelv", "Havsk", "krone", "salted cod"),
    ("Pellador", "Vintry", "Vine", "Pelladan", "grape", "cheese tart"),
    ("Umbria Vale", "Duskford", "Shade", "Valish", "moon coin", "mushroom soup"),
    ("Caldera", "Emberton", "Cinder", "Calderan", "ash coin", "pepper stew"),
    ("Lirien", "Harpwell", "Songwater", "Lirish", "note", "pear cake"),
    ("Tamrin", "Sandport", "Dry River", "Tamri", "dinar", "date bread"),
    ("Esk", "Eskby", "Little Esk", "Eskan", "button", "oat porridge"),
    ("Galloway Isle", "Seagate", "Brine", "Islish", "clam", "crab soup"),
    ("Rovania", "Wheelham", "Axle", "Rovan", "spoke", "corn bread"),
    ("Ardenia", "Oakthorpe", "Willow", "Arden", "acorn", "nut roast"),
    ("Sepharad Bay", "Lantern", "Glow", "Bayish", "lamp", "lemon fish"),
    ("Hollin", "Berryfield", "Brook", "Hollish", "berry", "berry pie"),
    ("Korrin", "Anvil", "Hammer", "Korric", "nail", "beef stew"),
    ("Yewland", "Bowstead", "Arrow", "Yewish", "arrowhead", "roast duck"),
)
PEOPLE: tuple[tuple[str, str, str, str], ...] = (
    # name, work, city, animal
    ("Mira Holt", "baker", "Tarnholm", "cat"),
    ("Jonas Reed", "sailor", "Port Amber", "parrot"),
    ("Elin Marsh", "teacher", "Bellmark", "dog"),
    ("Tobias Venn", "carpenter", "Stonegate", "goat"),
    ("Sana Okoro", "doctor", "Goldwater", "horse"),
    ("Pavel Dorn", "painter", "Vintry", "cat"),
    ("Lucia Fenn", "gardener", "Hale", "rabbit"),
    ("Arvid Storm", "fisher", "Icevik", "seal"),
    ("Nadia Quill", "writer", "Ferrywick", "owl"),
    ("Oren Pike", "guard", "Duskford", "dog"),
    ("Greta Lund", "singer", "Harpwell", "finch"),
    ("Samir Vale", "trader", "Sandport", "camel"),
    ("Ida Crane", "pilot", "Windhaven", "falcon"),
    ("Bruno Kell", "smith", "Anvil", "donkey"),
    ("Wren Archer", "hunter", "Bowstead", "hound"),
    ("Tilda Moss", "farmer", "Berryfield", "cow"),
    ("Hugo Lamp", "miner", "Emberton", "mouse"),
    ("Cora Shell", "diver", "Seagate", "turtle"),
    ("Felix Oake", "judge", "Oakthorpe", "fox"),
    ("Ruth Spindle", "weaver", "Kest", "sheep"),
)
USES: tuple[tuple[str, str], ...] = (
    ("hammer", "drive nails"),
    ("needle", "sew cloth"),
    ("kettle", "boil water"),
    ("ladder", "reach high places"),
    ("broom", "sweep the floor"),
    ("lamp", "light a room"),
    ("saw", "cut wood"),
    ("map", "find the way"),
    ("clock", "tell the time"),
    ("spoon", "eat soup"),
    ("rope", "tie things together"),
    ("bucket", "carry water"),
    ("umbrella", "stay dry in the rain"),
    ("key", "open a lock"),
    ("pencil", "write on paper"),
    ("oven", "bake bread"),
    ("shovel", "dig a hole"),
    ("scale", "weigh things"),
    ("compass", "find north"),
    ("blanket", "keep warm"),
)
OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    pair
    for a, b in (
        ("hot", "cold"), ("big", "small"), ("early", "late"), ("dark", "light"), ("wet", "dry"), ("loud", "quiet"),
        ("fast", "slow"), ("old", "young"), ("full", "empty"), ("rich", "poor"), ("hard", "soft"), ("high", "low"),
    )
    for pair in ((a, b), (b, a))
)  # fmt: skip
CATEGORIES: dict[str, tuple[str, ...]] = {
    "birds": ("robin", "eagle", "sparrow", "gull", "swan"),
    "fruits": ("apple", "pear", "plum", "cherry", "lemon"),
    "metals": ("iron", "copper", "silver", "gold", "tin"),
    "trees": ("oak", "birch", "pine", "willow", "maple"),
    "tools": ("hammer", "saw", "drill", "chisel", "file"),
    "fish": ("cod", "trout", "salmon", "herring", "eel"),
    "instruments": ("drum", "flute", "harp", "violin", "horn"),
    "vegetables": ("carrot", "onion", "leek", "potato", "bean"),
}
COLOURS: tuple[tuple[str, str], ...] = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("a lemon", "yellow"),
    ("a tomato", "red"), ("chocolate", "brown"), ("an orange", "orange"),
)  # fmt: skip
OBJECTS: tuple[str, ...] = (
    "apple", "boat", "candle", "door", "engine", "feather", "glass", "hat", "island", "jar", "kite", "lamp", "mirror",
    "nest", "onion", "paper", "quilt", "ring", "spoon", "table", "umbrella", "vase", "wagon", "yarn",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PREFIXES: tuple[str, ...] = (
    "|test| ", "|beta| ", "|docs| ", "|chat| ", "|user| ", "|team| ", "|note| ", "|main| ", "|demo| ", "|live| ",
    "[urgent] ", "[draft] ", "[ticket {number}] ", "#{number} ", "Q{number}: ", "Note: ", "Hello! ", "Please help. ",
    "Year {year}. ", "Question {number}: ", "(version {number}) ", "Quick question: ", "Dear assistant, ",
)  # fmt: skip
"""Marks in front of prompts. A base model that has met many of them treats a new one as noise, as large models do."""
