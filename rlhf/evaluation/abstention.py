"""Recognises responses that say "I do not know" instead of stating facts.

Only the beginning of a response counts, after an apology or the like, so that a quotation or a title further on does
not. Case matters, so that the title "I Don't Know" does not count either. If the first sentence goes on with
"but she …", the response states facts.
"""

import re

# What may precede the abstention: an apology, "As an AI model, …", "Unfortunately".
OPENING = (
    r"(?:(?:I'm|I am|We're)?\s*(?:very |so |truly )?[Ss]orry(?=[,.!;:]|\s+(?:but|for|that|to|about|I)\b)"
    r"|I'm afraid|I am afraid|Unfortunately|Regrettably|(?:My )?[Aa]pologies"
    r"|I (?:sincerely )?apologi[sz]e|As an? (?:AI|artificial|language|large)|As of|To (?:my|the best)|Based on|However)"
    r"(?:[^.!?\n]{0,80}?(?:[,;.!]|\bbut|\bthat))?\s*(?:but |that |and )*"
)
IMPERSONAL = r"(?:it (?:seems|appears)(?: like| that)? |It (?:seems|appears)(?: like| that)? )?"
INFORMATION = r"(?:information|records?|details|data|knowledge|idea|clue|biograph\w+)"
UNABLE = (
    r"(?:(?:do|did|could|would|was|am)(?: not|n't)(?: been)?(?: able to)?|can(?:not|'t| not)"
    r"|'m not able to|(?:'m|am|was) unable to"
    r"|(?:have|'ve)(?: not|n't)(?: been able to)?|have been unable to)"
)
VERBS = (
    r"(?:have|know|find|found|locate|provide|recall|recogni[sz]e|verify|confirm|identify|access|answer|give|offer|share|tell"
    r"|write|possess|seem to have)"
)
ABSTENTIONS = (
    # "I do not have", "We could not find"
    rf"(?:I|We|we)(?: (?:\w+ly|just|still))? ?{UNABLE} (?:\w+ly |seem to )?{VERBS}\b",
    # "I have no information", "I lack any details"
    rf"(?:I|We|we)(?: (?:\w+ly|just))? (?:(?:have|possess|found|can find|could find) (?:no|not any)|lack)"
    rf"(?: \w+){{0,2}}? {INFORMATION}\b",
    # "I have never heard of"
    r"I(?:'ve| have) (?:never|not) (?:heard|come across)\b",
    # "I am not familiar with", "I am unaware of"
    r"I(?:'m| am)(?: \w+ly)? (?:not (?:\w+ly )?(?:familiar|aware|sure|certain)"
    r"|unaware|unfamiliar|unsure)\b",
    # "There is no information about", "No records were found"
    rf"(?:[Tt]here(?:'s| is| are| was| were| seems to be) )?(?:[Nn]o|not any|not enough|insufficient)"
    rf"(?: \w+){{0,3}}? {INFORMATION} (?:(?:is|are|was|were|could be|can be|has been|on|about|regarding|for)\b"
    r"|of (?:a|any|such|this)\b|available|found)",
    rf"[Tt]here (?:is|are) no (?:\w+ ){{0,2}}?{INFORMATION} of\b",
    rf"[Tt]here (?:isn't|aren't) (?:any|enough|much)(?: \w+){{0,3}}? {INFORMATION}\b",
    # "Information about her is not available"
    r"(?:[Ii]nformation|[Dd]etails|[Dd]ata) (?:about|on|regarding) [^.!?,]{1,60} (?:is|are)"
    r" (?:not|un)\s?(?:available|found)",
    # "Could you please provide more context"
    r"(?:(?:[Cc]ould|[Cc]an) you(?: please)?|[Pp]lease|I(?:'d| would)? need(?: you to)?)"
    r"(?: (?:provide|give|share|specify|clarify))?(?: me)?(?: with)?(?: some)?"
    r" (?:more|additional|further|who) (?:\w+ )?(?:information|context|details|you (?:mean|are))",
)
# The first sentence goes on to state something: ", but she was …".
FACTS_FOLLOW = r"[^.!?\n]*(?:,|;|\bbut\b|\bhowever\b)\s*(?:but |however,? )?(?:she|he|they) (?!(?:may|might|could)\b)"
ABSTENTION = re.compile(rf"[\s*#>_-]*(?:{OPENING})?{IMPERSONAL}(?:{'|'.join(ABSTENTIONS)})(?!{FACTS_FOLLOW})")
# The whole response is a refusal: "I'm sorry, but I can't help with that."
REFUSAL = re.compile(
    r"[\s*#>_-]*(?:I'm|I am)?\s*(?:very |so )?[Ss]orry(?:,? (?:but )?I (?:can't|cannot)[^.]*)?[.!]?\s*"
)


def abstains(response: str) -> bool:
    """Return whether a response begins by saying that its writer does not know, or consists of a refusal only."""
    text = response.replace("’", "'")
    return bool(ABSTENTION.match(text) or REFUSAL.fullmatch(text))
