"""The phrases that the stories of the pre-training text are put together from."""

# How a story begins, by the sum that it hides: {a} operation {b} is what {A} has then. "=" hides none.
OPENINGS: dict[str, tuple[str, ...]] = {
    "=": (
        "{A} had {a} {things}.",
        "{A} has {a} {things}.",
        "{A} owned {a} {things}.",
        "There were {a} {things} in {A}'s {holder}.",
    ),
    "+": (
        "{A} had {a} {colour} {things} and {b} {colour2} {things}.",
        "{A} collected {a} {things} on {day} and {b} on {day2}.",
        "On {day} {A} picked {a} {things}, on {day2} {b} more.",
        "{B} has {a} {things}. {A} has {b} more than {B}.",
        "{A} has {a} {things} in a {holder} and {b} in {her} hand.",
    ),
    "-": (
        "{B} has {a} {things}. {A} has {b} fewer than {B}.",
        "{A} wants {a} {things} but {b} are missing.",
        "{B} had {a} {things}. {A} had {b} less.",
    ),
    "*": (
        "{A} had {a} {holders} with {b} {things} in each.",
        "{A} opened {a} {holders}. Each held {b} {things}.",
        "There are {a} {holders} with {b} {things} in each. All belong to {A}.",
        "{A} filled {a} {holders} and put {b} {things} into each of them.",
        "{A} made {a} {things} each day for {b} days.",
        "{B} had {a} {things}. {A} had {b} times as many as {B}.",
    ),
    "/": ("{B} had {a} {things} and put them equally into {b} {holders}. {A} took one {holder}.",),
}

# What happens next, by operation: what there is, operation {b}.
EVENTS: dict[str, tuple[str, ...]] = {
    "+": (
        "{She} found {b} more.",
        "{She} bought {b} {things}.",
        "{B} gave {her} {b} more.",
        "Then {she} brings {b} more {things}.",
        "{A} got {b} from {B}.",
        "{She} won {b}.",
        "{B} brought {b} {things} for {A}.",
        "{She} made {b} more {things}.",
    ),
    "-": (
        "{She} gave {b} to {B}.",
        "{She} lost {b} of them.",
        "{She} sold {b}.",
        "{She} uses {b} {things}.",
        "{B} took {b} {things}.",
        "{A} used {b} of them.",
        "{She} gave {b} {things} to {B}.",
        "{She} lost {b}.",
    ),
    "*": (
        "Soon {she} had {b} times as many.",
        "The number grew {b} times.",
        "Then {A} has {b} times as many {things}.",
    ),
    "half": ("{She} gave half of them to {B}.", "{She} lost half of the {things}.", "{A} sold half of them."),
    "/": (
        "{She} shared them equally among {b} {group}.",
        "{She} put them equally into {b} {holders}.",
        "{She} packed all the {things} into {b} {holders}, the same number in each.",
        "{b} {group} shared them equally.",
        "{She} shared all {things} equally among {b} {group}.",
        "{She} put the rest equally into {b} {holders}.",
    ),
}

# How a result is told; {sum} is `a + b = n`.
STATES: dict[str, tuple[str, ...]] = {
    "all": (
        "Now {she} has {n}.",
        "That makes {n} {things}.",
        "{sum}.",
        "{sum}, so {she} has {n} {things}.",
        "Now {A} has {sum} {things}.",
        "There are {sum} {things}.",
        "{A} had {sum} {things}.",
        "So {she} has {n} {things}.",
        "Then there were {sum}.",
    ),
    "-": (
        "{n} {things} are left.",
        "{She} has {n} left.",
        "{She} kept {sum} {things}.",
        "There are {sum} {things} left.",
        "{She} kept {n}.",
        "{sum} were left.",
        "{A} kept {sum}.",
        "{A} has {sum} {things} left.",
    ),
    "/": (
        "Each got {n} {things}.",
        "Each got {sum} {things}.",
        "{sum} for each.",
        "Each part is {n}.",
        "That is {sum} {things} in each.",
        "Each {holder} holds {sum} {things}.",
    ),
}

# Parts of one sentence, joined by commas and "and" after the name of who does it.
DEEDS: dict[str, tuple[str, ...]] = {
    "+": ("found {b} more", "bought {b}", "got {b} more", "found {b}", "got {b} from {B}", "bought {b} more {things}"),
    "-": ("gave {b} to {B}", "lost {b}", "sold {b}", "used {b}", "lost {b} of them", "gave {b} {things} to {B}"),
    "*": ("soon had {b} times as many",),
    "half": ("gave half of them to {B}", "lost half of them", "sold half"),
    "/": ("shared them equally among {b} {group}", "put the rest equally into {b} {holders}"),
}
RETELL = ("Let us count.", "Look at the numbers.", "Count again.", "Step by step.", "In sums.")
CLOSINGS = ("In the end it is {n}.", "So the number is {n}.", "{n} it is.", "The count ends at {n}.")
ASKS = (
    "How many now? {n}.",
    '"How many {things}?" asks {B}. "{n}," says {A}.',
    "{B} wants to know the number. It is {n}.",
    "How many {things} is that? It is {n} {things}.",
    "Who knows how many? {n}!",
)
