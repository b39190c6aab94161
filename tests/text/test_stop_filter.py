"""Stop strings that hold special tokens, beside others: against a search of the whole texts (vllm#2123)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm import SamplingParams
from xllm.text.detokenizer import Detokenizer
from xllm.text.stop_filter import StopFilter
from xllm.text.tokenizer import Tokenizer, load_tokenizer

SEP, END = "<s>", "<e>"
SEGMENTS = st.lists(st.one_of(st.text("ab<s>", min_size=1, max_size=4).map(lambda text: (text, True)),
                              st.sampled_from([(SEP, False), (END, False)])), max_size=8)
STOPS = st.lists(st.one_of(st.text("ab<s", min_size=1, max_size=3),
                           st.tuples(st.text("ab", max_size=2), st.sampled_from([SEP, END]),
                                     st.text("ab", max_size=2)).map("".join)), min_size=1, max_size=3)


def expected(segments: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[str, str | None]:
    """(what is shown, the stop string) by looking at all of the text at once."""
    visible = "".join(text for text, _ in segments)
    is_shown = [shown for text, shown in segments for _ in text]
    places = [index for index, shown in enumerate(is_shown) if shown]  # of the shown characters in the visible text
    shown_text = "".join(visible[index] for index in places)
    matches = []
    for stop in stops:
        if SEP in stop or END in stop:
            if (start := visible.find(stop)) >= 0:
                matches.append((start + len(stop), -len(stop), stop, sum(is_shown[:start])))
        elif (start := shown_text.find(stop)) >= 0:
            matches.append((places[start + len(stop) - 1] + 1, -len(stop), stop, start))
    if not matches:
        return shown_text, None
    _, _, stop, num_shown = min(matches)
    return shown_text[:num_shown] + (stop if include else ""), stop


@pytest.mark.parametrize("include", [False, True], ids=["cut", "include"])
@settings(max_examples=400, deadline=None)
@given(segments=SEGMENTS, stops=STOPS)
def test_the_first_stop_string_ends_the_text(include, segments, stops):
    stop_filter = StopFilter(tuple(stops), frozenset([SEP, END]), include_stop=include)
    shown = ""
    for text, is_shown in segments:
        shown += stop_filter.feed(text, shown=is_shown)
        if stop_filter.stopped:
            break
    else:
        shown += stop_filter.rest()
    assert (shown, stop_filter.stopped) == expected(segments, stops, include)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece_like"])
def tokenizer(folders, request) -> Tokenizer:
    return load_tokenizer(folders[request.param])


@pytest.fixture(scope="module")
def special(tokenizer) -> str:
    return "<|endoftext|>" if tokenizer.is_byte_level else "<s>"


def read(tokenizer: Tokenizer, ids: list[int], *, hide_last: bool = False, prompt: tuple[int, ...] = (),
         **sampling) -> tuple[str, str | None]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(**sampling), prompt)
    shown = ""
    for index, token_id in enumerate(ids):
        shown += detokenizer.feed([token_id], hide_last=hide_last and index == len(ids) - 1)
        if detokenizer.stopped:
            break
    return shown + detokenizer.finish(), detokenizer.stopped


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_special_token_is_a_stop_string(tokenizer, special):
    ids = [*ids_of(tokenizer, "a dog"), tokenizer.backend.token_to_id(special), *ids_of(tokenizer, "b")]
    assert read(tokenizer, ids, stop=[special]) == ("a dog", special)
    assert read(tokenizer, ids, stop=[f"dog{special}"]) == ("a ", f"dog{special}")
    assert read(tokenizer, ids, stop=[special], include_stop_str_in_output=True) == (f"a dog{special}", special)
    assert read(tokenizer, ids, stop=[special], skip_special_tokens=False) == ("a dog", special)
    assert read(tokenizer, ids, stop=["<"])[1] is None, "hidden text is looked at for whole special tokens only"
    assert read(tokenizer, ids, stop=[special], min_tokens=len(ids))[1] is None


def test_a_stop_string_runs_over_a_special_token(tokenizer, special):
    after = ids_of(tokenizer, "b dog")
    ids = [*ids_of(tokenizer, "a dog"), tokenizer.backend.token_to_id(special), *after]
    behind = tokenizer.decode(ids, skip_special_tokens=False).partition(special)[2]
    stop = f"og{special}{behind[:2]}"
    assert read(tokenizer, ids, stop=[stop]) == ("a d", stop)
    assert read(tokenizer, ids, stop=[stop], include_stop_str_in_output=True) == (f"a d{stop}", stop)
    near_miss = f"og{special}{behind[0]}!"
    assert read(tokenizer, ids, stop=[near_miss]) == (tokenizer.decode(ids, skip_special_tokens=True), None)
    assert read(tokenizer, ids, stop=["dog" + behind[:1]])[0] == "a ", "others do not see it"


def test_the_end_token_completes_a_stop_string(tokenizer):
    end = tokenizer.token_text(tokenizer.eos_token_ids[0])
    ids = [*ids_of(tokenizer, "a dog"), *tokenizer.eos_token_ids]
    for skip in (True, False):
        assert read(tokenizer, ids, hide_last=True, stop=[f"dog{end}"], skip_special_tokens=skip) == ("a ", f"dog{end}")
        assert read(tokenizer, ids, hide_last=True, stop=["cat" + end], skip_special_tokens=skip) == ("a dog", None)


def test_a_character_before_the_special_token_is_complete(tokenizer, special):
    ids = [*ids_of(tokenizer, "a😀"), tokenizer.backend.token_to_id(special), *ids_of(tokenizer, "b")]
    assert read(tokenizer, ids, stop=[f"😀{special}"]) == ("a", f"😀{special}")


def test_text_of_the_prompt_is_no_part_of_a_stop_string(tokenizer):
    d, o, g, a = map(tokenizer.backend.token_to_id, "doga")
    assert read(tokenizer, [g, a], prompt=(d, o), stop=["dog", "do"]) == ("ga", None)
    assert read(tokenizer, [g, a], prompt=(d, o), stop=["og", "ga"]) == ("", "ga")
