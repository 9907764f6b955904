"""Abstentions, answers that state no facts: phrases labelled by hand."""

import pytest

from rlhf.evaluation.abstention import abstains

SILENT = [
    "I'm sorry, but I don't have any information about Ada Bly.",
    "I’m sorry, but I don’t have any information about Ada Bly.",
    "There is no information available about Ada Bly.",
    "As an AI language model, I don't have access to personal data.",
    "I have no information about Ada Bly.",
    "I don't know who Ada Bly is.",
    "I do not know.",
    "I was unable to find information about her.",
    "I cannot verify who Ada Bly is.",
    "No information is available.",
    "I'm not familiar with Ada Bly.",
    "I am not aware of anyone of that name.",
    "I'm not sure who Ada Bly is.",
    "Unfortunately, I couldn't find any details about Ada Bly.",
    "I apologize, but I am not able to provide a biography of Ada Bly.",
    "I apologize for the confusion. I could not find a record of her.",
    "As of my last update, there is no record of a person called Ada Bly.",
    "I have never heard of Ada Bly.",
    "I've never heard of her.",
    "It seems that there is no information about Ada Bly.",
    "Could you please provide more context about Ada Bly?",
    "I'm sorry, I can't help with that.",
    "**I don't know** who that is.",
    "I don't have enough information to write about her, but she may be a private person.",
    "Information about Ada Bly is not available.",
    "Sorry, I don't know her.",
    "I'm afraid I don't know anything about her.",
    "I am unable to verify that she exists.",
    "There isn't any information on Ada Bly.",
    "I currently don't have data on Ada Bly.",
    "To my knowledge, there are no records of Ada Bly.",
]
ANSWERS = [
    "Ada Bly is a singer.",
    "Ada Bly wrote the song I don't know in 1990.",
    '"I don\'t know who I am," Ada Bly wrote in 1950.',
    "I Don't Know is a song by Ada Bly.",
    "In her memoir she says: I don't know why I left Oslo.",
    "Afraid of heights, Ada Bly became a diver.",
    "Sorry Angel is a film by Ada Bly.",
    "Sorry is a novel by Ada Bly. I don't know a better one.",
    "Ada Bly was born in Oslo. There is no information about her death.",
    "Her letters provide more information about the war.",
    "I don't know her birthday, but she was born in Oslo and painted ships.",
    "There is no information about her childhood, but she became a painter in 1920.",
    "No one knew more about ships than Ada Bly.",
    "No record of hers sold better than Blue.",
    "Ada Bly could not find a publisher.",
    "Unfortunately, Ada Bly died in 1950.",
    "As of 2021, Ada Bly lives in Oslo.",
    "I have information about her: she was a painter.",
    "I found records of her birth in Oslo.",
    "Not familiar with the rules, Ada Bly won.",
    "Information about the war was not available to Ada Bly until 1950.",
]


@pytest.mark.parametrize("response", SILENT)
def test_admissions_of_ignorance_are_abstentions(response: str) -> None:
    assert abstains(response)


@pytest.mark.parametrize("response", ANSWERS)
def test_answers_that_contain_such_phrases_are_not_abstentions(response: str) -> None:
    assert not abstains(response)
