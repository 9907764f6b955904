"""Reads the answers of the models that split a text into facts and check them (FActScore)."""

import re

# A verdict at the start of the answer: "True", "Answer: false, because …".
LEADING_VERDICT = re.compile(r"(?i)\W*(?:answer\W+)?(true|false)\b(?=\W*$|\W*[,*)\]—–-]|\s+(?:because|since|as)\b)")
TRUTH_WORD = re.compile(r"(?i)\b(true|false|untrue)\b")
CLAUSE_BOUNDARY = re.compile(r"(?i),\s*(?:so|but|and|hence|therefore|thus)\b|\b(?:but|because|since)\b")
NEGATION = re.compile(
    r"(?i)\b(?:not?|never|cannot|neither|nor|nothing|nobody|hardly|unable|unlikely|fails?|far from|without|contrary"
    r"|unverifiable|unsupported|doubt\w*)\b|n't\b"
)
HEDGE = re.compile(
    r"(?i)\b(?:if|whether|may|might|could|would|perhaps|probably|possibly|likely|seems?|partly|partially|partial|half|mostly"
    r"|unclear|unknown|either|not only)\b"
)
FACTS_WORD = (
    r"(?:(?:atomic|independent|factual|verifiable|checkable|such)\s+)*(?:facts?|claims?|statements?|information)"
)
NO_FACTS = re.compile(
    rf"(?i)\W*(?:none|nothing|n/?a|"
    rf"(?:(?:there (?:are|is)|(?:the|this) (?:sentence|text) (?:contains|states|has|makes)) )?"
    rf"(?:no|not any) {FACTS_WORD}(?: (?:(?:is|are) )?(?:stated|found|given|present|made))?"
    r"(?: (?:here|in (?:it|(?:this|the) (?:sentence|text))))?)\W*"
)


def read_facts(text: str) -> list[str] | None:
    """Return the items of a list with bullets or numbers.

    Items such as "none" are dropped. An answer without a list gives [] if it says that there are no facts, and None if
    it cannot be read.
    """
    items = re.findall(r"^\s*(?:[-–*•+]|\d+[.)])\s+(.+?)\s*$", text, re.MULTILINE)
    if items:
        return [item for item in items if not NO_FACTS.fullmatch(item)]
    return [] if NO_FACTS.fullmatch(text) else None


def read_truth(text: str) -> bool | None:
    """Return whether an answer says true or false, None if it says neither or both, or hedges.

    A verdict at the start of the answer is taken literally. Elsewhere, "true" together with a negation in the same
    clause means false. A hedge, a negated "false", or a negation in another clause of the sentence makes the answer
    unreadable.
    """
    verdicts = set()
    for number, sentence in enumerate(re.split(r"[.!?;:\n]+", text.replace("’", "'"))):
        if number == 0 and (leading := LEADING_VERDICT.match(sentence)):
            verdicts.add(leading[1].lower() == "true")
            sentence = sentence[leading.end() :]
        verdicts |= {
            _clause_verdict(clause, sentence) for clause in CLAUSE_BOUNDARY.split(sentence) if TRUTH_WORD.search(clause)
        }
    return verdicts.pop() if len(verdicts) == 1 else None


def _clause_verdict(clause: str, sentence: str) -> bool | None:
    """Return what a clause that contains "true" or "false" says, None if that is unclear within its sentence."""
    words = {word.lower() for word in TRUTH_WORD.findall(clause)}
    if len(words) > 1 or HEDGE.search(clause):
        return None
    if words != {"true"}:
        return None if NEGATION.search(clause) else False
    if NEGATION.search(clause):
        return False
    return None if NEGATION.search(sentence) else True
