"""lm-eval 0.4.13, `local-completions` and `local-chat-completions`: lists of tokens, echoed and scored."""

from __future__ import annotations

import pytest

from tests.clients.replay import recorded
from tests.serving.server_process import ServerProcess

REQUESTS = recorded("lm_eval")


def score(choice: dict, num_context: int) -> tuple[float, bool]:
    """As lm-eval reads it: what follows the context but for the one token made, and whether all of it was greedy."""
    scored = choice["logprobs"]["token_logprobs"][num_context:-1]
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][num_context:-1]]
    return sum(scored), scored == best


def test_every_token_of_every_prompt_is_scored(server: ServerProcess) -> None:
    request = REQUESTS["loglikelihood"]
    prompts = request.body["prompt"]
    choices = request.json(server)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice, prompt in zip(choices, prompts, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        assert all(value in top.values()
                   for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True))


def test_what_the_model_would_say_scores_as_greedy(server: ServerProcess) -> None:
    """The score of a greedy continuation is the sum of the log-probabilities it was made with."""
    context = REQUESTS["loglikelihood"].body["prompt"][1]
    made = REQUESTS["generate"].json(server, prompt=[context], stop=None, logprobs=1, max_tokens=6,
                                     return_token_ids=True)["choices"][0]
    other = [*made["token_ids"][:-1], (made["token_ids"][-1] + 1) % 4096]
    answer = REQUESTS["loglikelihood"].json(server, prompt=[context + made["token_ids"], context + other])
    (good, good_is_greedy), (bad, bad_is_greedy) = (score(choice, len(context)) for choice in answer["choices"])
    assert good == pytest.approx(sum(made["logprobs"]["token_logprobs"]), abs=1e-3)
    assert good_is_greedy and not bad_is_greedy and bad < good


def test_a_batch_gives_what_each_gives_alone(server: ServerProcess) -> None:
    request = REQUESTS["loglikelihood"]
    together = request.json(server)["choices"]
    alone = [request.json(server, prompt=[prompt])["choices"][0] for prompt in request.body["prompt"]]
    for one, other in zip(together, alone, strict=True):
        assert score(one, 3)[0] == pytest.approx(score(other, 3)[0], abs=1e-3)


def test_generated_texts_end_before_their_stop_strings(server: ServerProcess) -> None:
    request = REQUESTS["generate"]
    choices = request.json(server)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert all(choice["text"] and not {"\n", "("} & set(choice["text"]) for choice in choices)
    whole = request.json(server, stop=None)["choices"]
    assert choices[0]["finish_reason"] == "stop"
    assert whole[0]["text"].startswith(choices[0]["text"]) and whole[0]["text"] != choices[0]["text"]


def test_a_chat(server: ServerProcess) -> None:
    choices = REQUESTS["chat"].json(server)["choices"]
    assert [choice["index"] for choice in choices] == [0]
    assert choices[0]["message"]["content"] and "\n" not in choices[0]["message"]["content"]
