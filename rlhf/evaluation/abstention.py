"""Does a response say that its writer does not know, instead of stating facts?

Only its beginning counts, after an apology or the like, so that a quotation or a title further on does not; letters
keep their case, so that the title "I Don't Know" does not count either. A first sentence that goes on with "but she …"
states facts.
"""

import re

OPENING = (
    r"(?:(?:I'm|I am|We're)?\s*(?:very |so |truly )?[Ss]orry(?=[,.!;:]|\s+(?:but|for|that|to|about|I)\b)"
    r"|I'm afraid|I am afraid|Unfortunately|Regrettably|(?:My )?[Aa]pologies"
    r"|I (?:sincerely )?apologi[sz]e|As an? (?:AI|artificial|language|large)|As of|To (?:my|the best)|Based on|However)"
    r"(?:[^.!?\n]{0,80}?(?:[,;.!]|\bbut|\bthat))?\s*(?:but |that |and )*"
)
IMPERSONAL = r"(?:it (?:seems|appears)(?: like| that)? |It (?:seems|appears)(?: like| that)? )?"
KNOWN = r"(?:information|records?|details|data|knowledge|idea|clue|biograph\w+)"
UNABLE = (
    r"(?:(?:do|did|could|would|was|am)(?: not|n't)(?: been)?(?: able to)?|can(?:not|'t| not)"
    r"|'m not able to|(?:'m|am|was) unable to"
    r"|(?:have|'ve)(?: not|n't)(?: been able to)?|have been unable to)"
)
VERBS = (
    r"(?:have|know|find|found|locate|provide|recall|recogni[sz]e|verify|confirm|identify|access|answer|give|offer|share|tell"
    r"|write|possess|seem to have)"
)
RULES = (
    rf"(?:I|We|we)(?: (?:\w+ly|just|still))? ?{UNABLE} (?:\w+ly |seem to )?{VERBS}\b",
    rf"(?:I|We|we)(?: (?:\w+ly|just))? (?:(?:have|possess|found|can find|could find) (?:no|not any)|lack)"
    rf"(?: \w+){{0,2}}? {KNOWN}\b",
    r"I(?:'ve| have) (?:never|not) (?:heard|come across)\b",
    r"I(?:'m| am)(?: \w+ly)? (?:not (?:\w+ly )?(?:familiar|aware|sure|certain)"
    r"|unaware|unfamiliar|unsure)\b",
    rf"(?:[Tt]here(?:'s| is| are| was| were| seems to be) )?(?:[Nn]o|not any|not enough|insufficient)"
    rf"(?: \w+){{0,3}}? {KNOWN} (?:(?:is|are|was|were|could be|can be|has been|on|about|regarding|for)\b"
    r"|of (?:a|any|such|this)\b|available|found)",
    rf"[Tt]here (?:is|are) no (?:\w+ ){{0,2}}?{KNOWN} of\b",
    rf"[Tt]here (?:isn't|aren't) (?:any|enough|much)(?: \w+){{0,3}}? {KNOWN}\b",
    r"(?:[Ii]nformation|[Dd]etails|[Dd]ata) (?:about|on|regarding) [^.!?,]{1,60} (?:is|are)"
    r" (?:not|un)\s?(?:available|found)",
    r"(?:(?:[Cc]ould|[Cc]an) you(?: please)?|[Pp]lease|I(?:'d| would)? need(?: you to)?)"
    r"(?: (?:provide|give|share|specify|clarify))?(?: me)?(?: with)?(?: some)?"
    r" (?:more|additional|further|who) (?:\w+ )?(?:information|context|details|you (?:mean|are))",
)
FACTS_FOLLOW = r"[^.!?\n]*(?:,|;|\bbut\b|\bhowever\b)\s*(?:but |however,? )?(?:she|he|they) (?!(?:may|might|could)\b)"
ABSTENTION = re.compile(rf"[\s*#>_-]*(?:{OPENING})?{IMPERSONAL}(?:{'|'.join(RULES)})(?!{FACTS_FOLLOW})")
REFUSAL = re.compile(
    r"[\s*#>_-]*(?:I'm|I am)?\s*(?:very |so )?[Ss]orry(?:,? (?:but )?I (?:can't|cannot)[^.]*)?[.!]?\s*"
)


def abstains(response: str) -> bool:
    """Whether a response begins with saying that its writer does not know."""
    text = response.replace("’", "'")
    return bool(ABSTENTION.match(text) or REFUSAL.fullmatch(text))
