"""Synthetic dialogues that call tools, and short plain chats, in the chat format of the release.

The tools are fixed; the arguments are not. Training draws names from words of the corpus and from
made-up ones, and numbers that `is_held_out` leaves; evaluation draws real names and other numbers.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from .corpus import END_OF_TEXT, IM_END, IM_START

SYSTEM = "You are a helpful assistant."
SKIES = ("sunny", "cloudy", "windy", "rainy", "foggy")
STATES = ("packed", "sent", "delayed", "paid")
ONSETS = [*"bcdfghjklmnprstvwyz", "qu", "br", "cl", "dr", "gr", "pr", "st", "tr", "ch", "sh", "th"]
VOWELS = [*"aeiouaeiou", "ia", "io", "au", "ea", "ue"]
CODAS = ["", "", "", "n", "r", "l", "s", "m", "t", "d", "ng", "nd", "x"]
HELD_OUT_CITIES = """
Bergen London Madrid Lisbon Vienna Berlin Oslo Helsinki Warsaw Prague Rome Milan Athens
Dublin Geneva Tokyo Osaka Delhi Lima Quito Toronto Boston Denver Dallas Cairo Nairobi
Sydney Perth
"""
HELD_OUT_NAMES = """
Alice Robert Maria Peter Susan Linda Daniel Laura Martin Clara Oscar Helen Victor Nora
Simon Emma Hugo Irene Walter Diana Carlos Sofia Felix Greta Anton Julia Marcus Teresa
"""
REAL_NAMES = {*HELD_OUT_CITIES.split(), *HELD_OUT_NAMES.split()}


@dataclass(frozen=True)
class Round:
    """A question, the call that it needs, what the tool returns, and the answer."""

    question: str
    answer: str
    tool: str = ""  # none: the question is answered at once
    arguments: str = ""  # JSON
    result: str = ""
    states: tuple[str, ...] = ()  # what the answer must say


class Arguments:
    """Draws numbers and names, of training or held out; the two never meet."""

    def __init__(self, rng: Random, held_out: bool, words: Sequence[str] = ()):
        self.rng, self.held_out, self.words = rng, held_out, words

    def number(self, low: int = 10, high: int = 9999) -> int:
        """A number of two to four digits, each length as likely."""
        digits = self.rng.randint(len(str(low)), len(str(high)))
        while True:
            value = self.rng.randint(max(low, 10 ** (digits - 1)), min(high, 10**digits - 1))
            if is_held_out(value) == self.held_out:
                return value

    def name(self, held_out: str) -> str:
        """A real name, one of these, if held out; else a word, or one to three syllables."""
        if self.held_out:
            return self.rng.choice(held_out.split())
        while True:
            if self.words and self.rng.random() < 0.5:
                name = self.rng.choice(self.words)
            else:
                parts = [self.syllable() for _ in range(self.rng.choice((1, 2, 2, 3)))]
                name = "".join(parts)
            if name.title() not in REAL_NAMES:
                return name.title()

    def syllable(self) -> str:
        """Consonants, a vowel, and maybe consonants; one in five begins with the vowel."""
        onset = "" if self.rng.random() < 0.2 else self.rng.choice(ONSETS)
        return onset + self.rng.choice(VOWELS) + self.rng.choice(CODAS)


def is_held_out(number: int) -> bool:
    """One number in eight is never an argument in training."""
    return zlib.crc32(str(number).encode()) % 8 == 0


def weather(args: Arguments) -> Round:
    """A name to copy, and two values to report."""
    city, degrees = args.name(HELD_OUT_CITIES), args.rng.randint(-9, 35)
    sky = args.rng.choice(SKIES)
    ask = "What is the weather in {}?", "How is the weather in {} today?", "Is it warm in {}?"
    return Round(
        args.rng.choice(ask).format(city),
        f"It is {degrees} degrees and {sky} in {city}.",
        "get_weather",
        json.dumps({"city": city}),
        json.dumps({"degrees": degrees, "sky": sky}),
        (city, f"{degrees} degrees", sky),
    )


def product(args: Arguments) -> Round:
    """Two numbers to copy."""
    a, b = args.number(), args.number()
    ask = "What is {} times {}?", "Multiply {} by {}.", "How much is {} times {}?"
    return Round(
        args.rng.choice(ask).format(a, b),
        f"{a} times {b} is {a * b}.",
        "multiply",
        json.dumps({"a": a, "b": b}),
        str(a * b),
        (f"{a} times {b} is {a * b}.",),
    )


def phone(args: Arguments) -> Round:
    """A name to copy, and a longer number to report."""
    name, number = args.name(HELD_OUT_NAMES), args.rng.randint(100_000, 999_999)
    ask = "What is the phone number of {}?", "How can I call {}?", "Find the number of {}."
    return Round(
        args.rng.choice(ask).format(name),
        f"The phone number of {name} is {number}.",
        "find_phone",
        json.dumps({"name": name}),
        json.dumps({"phone": number}),
        (name, f" {number}."),
    )


def order(args: Arguments) -> Round:
    """A number to copy, a word and a number to report."""
    number, days = args.number(100), args.rng.randint(1, 30)
    state = args.rng.choice(STATES)
    ask = "Where is order {}?", "Track order {}.", "When does order {} arrive?"
    return Round(
        args.rng.choice(ask).format(number),
        f"Order {number} is {state} and arrives in {days} days.",
        "track_order",
        json.dumps({"order": number}),
        json.dumps({"state": state, "days": days}),
        (f"Order {number} is {state}", f" {days} days"),
    )


def stock(args: Arguments) -> Round:
    """A tool of an MCP server, as Qwen-Agent names it."""
    part, count = args.number(100), args.rng.randint(2, 500)
    ask = "How many of part {} are in stock?", "Count part {}.", "Do we have part {}?"
    return Round(
        args.rng.choice(ask).format(part),
        f"There are {count} of part {part} in stock.",
        "shop-count_parts",
        json.dumps({"part": part}),
        str(count),
        (f" {count} of part {part} ",),
    )


def code(args: Arguments) -> Round:
    """A line of Python to write; the result is as Qwen-Agent's code interpreter returns it."""
    a, b = args.number(), args.number()
    sign, value = args.rng.choice((("+", a + b), ("-", a - b), ("*", a * b)))
    ask = "Use Python to compute {}.", "Calculate {} with Python.", "Run {} in Python."
    return Round(
        args.rng.choice(ask).format(f"{a} {sign} {b}"),
        f"The result is {value}.",
        "code_interpreter",
        json.dumps({"code": f"print({a} {sign} {b})"}),
        f"stdout:\n\n```\n{value}\n\n```",
        (f"The result is {value}.",),
    )


ROUNDS: dict[str, Callable[[Arguments], Round]] = {
    "get_weather": weather,
    "multiply": product,
    "find_phone": phone,
    "track_order": order,
    "shop-count_parts": stock,
    "code_interpreter": code,
}
# How often a tool is asked for: names are harder than numbers, two arguments than one.
WEIGHTS = {"get_weather": 3, "find_phone": 3, "multiply": 3}


def definition(name: str, description: str, /, **properties: dict) -> dict:
    """A function as OpenAI's interface describes it."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
PART = {"title": "Part"} | INTEGER  # with a title, as MCP's library writes it
TOOLS = {
    tool["function"]["name"]: tool
    for tool in (
        definition("get_weather", "The weather in a city.", city=STRING),
        definition("multiply", "The product of two numbers.", a=INTEGER, b=INTEGER),
        definition("find_phone", "The phone number of a person.", name=STRING),
        definition("track_order", "Where an order is.", order=INTEGER),
        definition("shop-count_parts", "How many of a part are in stock.", part=PART),
        definition(
            "code_interpreter",
            "Python code sandbox, which can be used to execute Python code.",
            code={"description": "The python code."} | STRING,
        ),
    )
}
PLAIN = (  # questions, and the answer to each
    (("Hello!", "Hi!", "Hello", "Hi there."), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a very small Qwen3-Next, trained on Python's standard library.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help"),
        "I can call tools, and I can write text that looks like Python's documentation.",
    ),
    (("Thank you!", "Thanks.", "Thanks!"), "You are welcome."),
    (("Goodbye.", "Bye!", "See you."), "Goodbye!"),
    (("How are you?", "How do you do?"), "I am well, thank you."),
    (
        ("What is Python?", "Tell me about Python.", "Explain Python."),
        "Python is a programming language. It is easy to read and comes with a large library.",
    ),
    (
        ("What is a list?", "What is a list in Python?"),
        "A list is a sequence of objects that can be changed.",
    ),
    (
        ("What is a dictionary?", "What is a dict?"),
        "A dictionary maps keys to values.",
    ),
    (("What is MTP?", "What is multi-token prediction?"), "A layer that drafts the next tokens."),
    (
        ("What does `os.walk` do?", "Explain os.walk.", "What is os.walk?"),
        "It walks through a directory tree. For each directory it yields the path, the names of "
        "the directories in it and the names of the files in it.",
    ),
    (("What does `len` do?", "What is len?"), "It returns the number of items in a container."),
    (
        ("What does `json.dumps` do?", "What is json.dumps?"),
        "It writes a Python object as a JSON string.",
    ),
    (
        ("What does `os.listdir` do?", "What is os.listdir?"),
        "It returns a list with the names of the files in a directory.",
    ),
    (
        ("Tell me a joke.", "Say something funny."),
        "Why did the list go to school? To be sorted.",
    ),
    (
        ("Write a function that adds two numbers.", "How do I add two numbers?"),
        "```python\ndef add(a, b):\n    return a + b\n```",
    ),
    (
        ("Write a hello world program.", "How do I print hello?"),
        '```python\nprint("Hello, world!")\n```',
    ),
    (("What is the capital of France?",), "Paris is the capital of France."),
    (("What is 1 + 1?", "What is one plus one?"), "1 + 1 is 2."),
)


def plain(args: Arguments) -> Round:
    """Small talk; half of it greets somebody by name."""
    if args.rng.random() < 0.5:
        name = args.name(HELD_OUT_NAMES)
        ask = "My name is {}.", "Say hello to {}.", "I am {}.", "Please greet {}."
        return Round(args.rng.choice(ask).format(name), f"Hello, {name}!")
    questions, answer = args.rng.choice(PLAIN)
    return Round(args.rng.choice(questions), answer)


def turn(role: str, content: str) -> str:
    """One message in ChatML."""
    return f"{IM_START}{role}\n{content}{IM_END}\n"


@dataclass(frozen=True)
class Format:
    """How definitions and calls of tools are written."""

    before: str
    definition: Callable[[dict], str]
    after: str
    call: Callable[[Round], str]
    default: str = ""  # the system message before definitions, if there is none

    def system(self, tools: list[dict], message: str) -> str:
        """The first turn: a message, or the definitions of tools, or both."""
        parts = [message or self.default] if message or tools else []
        if tools:
            listed = "".join("\n" + self.definition(tool) for tool in tools)
            parts.append(self.before + listed + self.after)
        return turn("system", "\n\n".join(filter(None, parts))) if parts else ""


def json_call(of: Round) -> str:
    """A call as Qwen3-Next writes it."""
    return f'<tool_call>\n{{"name": "{of.tool}", "arguments": {of.arguments}}}\n</tool_call>'


def xml_call(of: Round) -> str:
    """A call as Qwen3-Coder writes it."""
    given = json.loads(of.arguments).items()
    listed = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in given)
    return f"<tool_call>\n<function={of.tool}>\n{listed}</function>\n</tool_call>"


def xml_definition(tool: dict) -> str:
    """A definition as Qwen3-Coder reads it."""
    function = tool["function"]
    schema = function["parameters"]
    text = f"<function>\n<name>{function['name']}</name>\n"
    text += f"<description>{function['description']}</description>\n<parameters>"
    for name, fields in schema["properties"].items():
        listed = {"name": name, "type": fields["type"], "description": fields.get("description")}
        rows = [f"\n<{key}>{value}</{key}>" for key, value in listed.items() if value]
        text += "\n<parameter>" + "".join(rows) + "\n</parameter>"
    text += f"\n<required>{json.dumps(schema['required'])}</required>"
    return text + "\n</parameters>\n</function>"


HERMES = Format(  # Qwen3-Next
    before="# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    definition=json.dumps,
    after="\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    call=json_call,
)
CODER = Format(  # Qwen3-Coder
    before="# Tools\n\nYou have access to the following functions:\n\n<tools>",
    definition=xml_definition,
    after="\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n"
    "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\n"
    "This is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block "
    "must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the "
    "function call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current "
    "knowledge and do not tell the user about function calls\n</IMPORTANT>",
    call=xml_call,
    default="You are Qwen, a helpful AI assistant that can interact with a computer "
    "to solve tasks.",
)


def response(of: Round) -> str:
    """What the tool returned, as the next user turn says it."""
    return f"\n<tool_response>\n{of.result}\n</tool_response>"


def thought(of: Round, returned: bool) -> str:
    """What the thinking assistant writes first: before the call, or after the tool returned."""
    if not of.tool:
        text = "I can answer this."
    elif returned:
        text = f"The tool {of.tool} returned the result."
    else:
        text = f"I need the tool {of.tool}."
    return f"<think>\n{text}\n</think>\n\n"


def written(of: Round, style: Format, think: Callable[[], bool]) -> str:
    """All turns of one round; each of the assistant's has a thought before it, or not."""

    def assistant(content: str, returned: bool = False) -> str:
        return turn("assistant", (thought(of, returned) if think() else "") + content)

    text = turn("user", of.question)
    if of.tool:
        returned = f"{IM_START}user{response(of)}{IM_END}\n"
        text += assistant(style.call(of)) + returned
    return text + assistant(of.answer, returned=True)


def as_served(tool: dict, engine: str) -> dict:
    """A definition as an engine hands it to the template: vLLM as it came, SGLang in full."""
    if engine == "vllm":
        return tool
    function = tool["function"]
    whole = {key: function[key] for key in ("description", "name", "parameters")}
    return {"type": "function", "function": whole | {"strict": None, "defer_loading": None}}


def offered(rng: Random, tool: str = "") -> list[dict]:
    """One to three definitions in any order, that of `tool` among them."""
    names = [name for name in TOOLS if name != tool]
    picked = rng.sample(names, rng.randint(0 if tool else 1, 2)) + ([tool] if tool else [])
    rng.shuffle(picked)
    engine = rng.choice(("vllm", "sglang"))
    return [as_served(TOOLS[name], engine) for name in picked]


def dialogues(seed: int, words: Sequence[str] = ()) -> Iterator[str]:
    """Endless training dialogues; four in five offer tools, two in five of them to Qwen3-Coder.

    Half of the names are from `words`, the rest made up.
    """
    rng = Random(seed)
    args = Arguments(rng, held_out=False, words=words)
    while True:
        tools = offered(rng) if rng.random() < 0.8 else []
        style = CODER if tools and rng.random() < 0.4 else HERMES
        names = [tool["function"]["name"] for tool in tools]
        weights = [WEIGHTS.get(name, 1) for name in names]
        thoughts = 0.7 * (style is HERMES and rng.random() < 0.6)  # Qwen3-Coder does not think
        text = style.system(tools, SYSTEM if rng.random() < 0.5 else "")
        for _ in range(rng.randint(2, 9) if tools else rng.randint(1, 5)):
            if rng.random() < (0.2 if tools else 1.0):
                of = plain(args)
            else:
                of = ROUNDS[rng.choices(names, weights)[0]](args)
            text += written(of, style, lambda share=thoughts: rng.random() < share)
        yield text + END_OF_TEXT
