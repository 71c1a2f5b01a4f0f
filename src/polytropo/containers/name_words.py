"""Words for the names of containers that nobody named."""

# fmt: off
ADJECTIVES = (
    "agile", "amber", "bold", "brave", "bright", "brisk", "calm", "clever", "cosmic", "crisp", "curious",
    "daring", "deft", "eager", "early", "fair", "fast", "fluent", "frosty", "gentle", "glad", "golden",
    "happy", "hardy", "humble", "jolly", "keen", "kind", "lively", "lucid", "lucky", "lunar", "mellow",
    "merry", "mighty", "modest", "nimble", "noble", "patient", "placid", "plucky", "polite", "proud",
    "quick", "quiet", "rapid", "ready", "serene", "sharp", "shiny", "silent", "smart", "snug", "solar",
    "spry", "steady", "sunny", "swift", "tidy", "vivid", "warm", "wise", "witty", "young",
)
NOUNS = (
    "badger", "beaver", "bison", "bittern", "condor", "crane", "curlew", "dipper", "dolphin", "dormouse",
    "eagle", "egret", "falcon", "ferret", "finch", "fox", "gannet", "gecko", "gibbon", "heron",
    "hedgehog", "hoopoe", "ibex", "ibis", "jackdaw", "jay", "kestrel", "kite", "lapwing", "lark",
    "lemur", "linnet", "lizard", "lynx", "magpie", "marmot", "marten", "merlin", "mole", "newt",
    "nightjar", "ocelot", "oriole", "osprey", "otter", "owl", "panda", "petrel", "pipit", "plover",
    "puffin", "quail", "rabbit", "raven", "robin", "salmon", "seal", "shrike", "siskin", "squirrel",
    "starling", "stoat", "stork", "swallow", "swan", "swift", "tapir", "teal", "tern", "thrush", "toad",
    "turtle", "vole", "wagtail", "walrus", "weasel", "whale", "wombat", "wren",
)
# fmt: on
