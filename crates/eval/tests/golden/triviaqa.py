"""Writes triviaqa.json: 1,000 invented answers, each with its references and TriviaQA's exact match and F1.

What it is for: an oracle in another language for `crates/eval/tests/triviaqa.rs`, on Python's own `re`, `str.lower` and
`str.split`. What it trades: it follows the algorithm published with TriviaQA (Joshi et al., 2017) step by step but is
written for this project, so it is evidence of the algorithm and not of that script's bytes. It refuses randomness
without a seed: run again (`python3 triviaqa.py`), it writes the same file.
"""

import collections
import json
import pathlib
import random
import re
import string

MARKS = str.maketrans({mark: " " for mark in string.punctuation + "‘’´`"})
ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normal(answer):
    text = answer.replace("_", " ").lower().translate(MARKS)
    return " ".join(ARTICLE.sub(" ", text).split())


def f1(prediction, gold):
    ours, theirs = normal(prediction).split(), normal(gold).split()
    shared = (collections.Counter(ours) & collections.Counter(theirs)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def best(score, answer, references):
    """TriviaQA judges against every alias of a question and keeps the highest score."""
    return max(score(answer, reference) for reference in references)


def exact_match(answer, reference):
    return normal(answer) == normal(reference)


# One reference each.
EDGES = [
    ("", ""), ("", "gold"), ("gold", ""), ("the", "a"), ("A", "A"), ("?!", ""), ("the", ""), (" ", "\t\n"),
    ("The Who", "who"), ("An_Apple", "apple"), ("snow_white", "Snow White"), ("U.S.A.", "USA"), ("U.S.A.", "u s"),
    ("rock-a-bye", "rock bye"), ("l’étoile", "L'ÉTOILE"), ("‘tis", "tis"), ("`x´", "x"), ("naïve", "naive"),
    ("ΣΊΣΥΦΟΣ", "Σίσυφος"), ("İzmir", "izmir"), ("STRASSE", "straße"), ("“the end”", "end"), ("“the end”", "the end"),
    ("the—end", "end"), ("a–b", "b"), ("x\u00a0y", "x y"), ("x\u001fy", "x y"), ("x\u200by", "x y"), ("x\u2028y", "x y"),
    ("new york new york", "new york"), ("new york", "new york new york"), ("b b b c", "b c c"), ("3.14", "3 14"),
    ("$1,000", "1 000"), ("a1", "1"), ("the2", "2"), ("anthem", "them"), ("thea", "a"), ("A & B", "B"), ("é", "e\u0301"),
    ("a\u0301", ""), ("the\u0301 end", "end"), ("a²", "²"), ("½ a cup", "½ cup"), ("北京", "北京"), ("the北京", "北京"),
    ("the 北京", "北京"), ("Ⅷ", "ⅷ"), ("_the_", ""), ("__", ""), ("What is gold?", "gold"), ("(Jane) Doe", "jane doe"),
]
WORDS = ["the", "a", "an", "The", "blue", "Blue", "red", "river", "sea", "king", "of", "O'Neil", "St.", "north-west", "7",
         "café", "und_er", "x/y", "&", "\"quoted\"", "end.", "Zoë", "co-op", "B.C.", "half-", "-ton", "it’s", "…"]


def phrase(rng):
    return rng.choice([" ", " ", "  ", "_", ", "]).join(rng.choices(WORDS, k=rng.randint(1, 6)))


def twist(rng, text):
    words = text.split()
    rng.shuffle(words)
    cut = words[: rng.randint(1, len(words))]
    return rng.choice([str.upper, str.title, str.lower])(" ".join(cut + rng.choices(WORDS, k=rng.randint(0, 2))))


# Several references: the best counts, wherever it stands, and a reference that normalises to nothing is one too.
SEVERAL = [
    ("gold", ["tin", "gold"]), ("gold", ["gold", "tin"]), ("the", ["gold", ""]), ("", ["gold", "!"]), ("x", ["", ""]),
    ("dark blue sea", ["blue", "dark blue", "sea of dark blue"]), ("b c", ["b", "c", "b c d"]), ("tin", ["zinc", "lead"]),
    ("new york", ["york new", "new york new york"]), ("An_Apple", ["pear", "apple!", "the apple"]),
]


def aliases(rng, gold):
    return [gold] + [twist(rng, gold) if rng.random() < 0.5 else phrase(rng) for _ in range(rng.randint(0, 3))]


def main():
    rng = random.Random(2017)
    cases = [(prediction, [gold]) for prediction, gold in EDGES] + SEVERAL
    while len(cases) < 1000:
        gold = phrase(rng)
        prediction = twist(rng, gold) if rng.random() < 0.8 else phrase(rng)
        references = aliases(rng, gold)
        rng.shuffle(references)
        cases.append((prediction, references))
    keys = ("prediction", "references", "normal_prediction", "exact_match", "f1")
    rows = [(p, r, normal(p), best(exact_match, p, r), float(best(f1, p, r))) for p, r in cases]
    lines = ",\n".join(json.dumps(dict(zip(keys, row)), ensure_ascii=False) for row in rows)
    path = pathlib.Path(__file__).with_name("triviaqa.json")
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
