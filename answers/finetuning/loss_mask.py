"""The exercise of finetuning/loss_mask: a conversation as a row of tokens with its labels, and its wrong versions."""

import torch

from minillm.study.exercise import Case, Exercise, Wrong

STUB = '''\
# exercise: finetuning/loss_mask
import torch


def labelled_row(ids, spans, *, length, pad):
    """A conversation as one row of `length` tokens, and the labels of that row.

    ids [t] are the conversation; each of spans [n, 2] is a stretch that the assistant wrote,
    its end of message included: its first place and one past its last. There may be no span.
    Return (row, labels), both int64 [length]. A conversation that is too long loses its end,
    one that is too short is filled with `pad` on the right. The label of a token inside a span
    is the token itself; all others are -100. Labels are not shifted: labels[i] is about row[i].
    `pad` may be an id that also stands in the conversation, such as the end of message.
    """
    raise NotImplementedError
'''


def oracle(ids, spans, *, length, pad):  # type: ignore[no-untyped-def]
    """Place by place."""
    row, labels = [], []
    for place in range(length):
        token = ids[place].item() if place < len(ids) else pad
        inside = any(start <= place < end for start, end in spans.tolist())
        row.append(token)
        labels.append(token if inside else -100)
    return torch.tensor(row), torch.tensor(labels)


def chat(*turns: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A conversation of turns (tokens of the user, tokens of the assistant), messages <10 role ... 2>."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    word = 20
    for user, assistant in turns:
        for role, count in ((11, user), (12, assistant)):
            start = len(ids) + 2
            ids += [10, role, *range(word, word + count), 2]
            word += count
            if role == 12:
                spans.append((start, len(ids)))
    return torch.tensor(ids), torch.tensor(spans)


def make_cases() -> list[Case]:
    return [
        Case("one answer", chat((2, 3)), {"length": 14, "pad": 5}, "12 tokens in a row of 14"),
        Case("two turns", chat((2, 3), (1, 2)), {"length": 24, "pad": 5}, "both answers are targets"),
        Case("padding ends messages", chat((1, 2), (2, 1)), {"length": 22, "pad": 2}, "pad is the end of message"),
        Case("an answer is cut", chat((2, 2), (1, 6)), {"length": 20, "pad": 5}, "the row ends inside an answer"),
        Case("nothing to learn", chat((9, 3)), {"length": 8, "pad": 5}, "the row ends before the answer begins"),
        Case("exactly full", chat((3, 2), (1, 1)), {"length": 19, "pad": 7}, "as long as the row"),
        Case("nobody answers", (torch.arange(20, 26), torch.zeros(0, 2).long()), {"length": 8, "pad": 5}, "no span"),
        Case("many turns", chat(*[(2, 4), (3, 1), (1, 5)] * 4), {"length": 90, "pad": 2}, "12 turns, cut"),
    ]


SAID = "said = ((starts <= place) & (place < ends)).any(dim=0)"
SPANS = "starts, ends = spans[:, :1], spans[:, 1:]"
FILL = "row[: len(ids)] = ids[:length]"
PLACE = "\n    place = torch.arange(length, device=ids.device)\n"
GIVE = "return row, row.masked_fill(~said, IGNORE)"
LOSS = "return next_token_loss(logits, labels.clamp(min=0), ignore=labels == IGNORE)"
TOY = "finetuning/chat_toy"

EXERCISE = Exercise(
    question="finetuning/loss_mask",
    module="finetuning/loss_mask",
    function="labelled_row",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("row", "labels"),
    rtol=0,  # whole numbers
    atol=0,
    wrong=(
        Wrong(
            "starts one late",
            SAID,
            "said = ((starts < place) & (place < ends)).any(dim=0)",
            "The first token of each answer is not a target, so the model never learns how an answer begins. A span "
            "already starts after the header: do not add 1.",
        ),
        Wrong(
            "without the end",
            SAID,
            "said = ((starts <= place) & (place < ends - 1)).any(dim=0)",
            "The end of message is not a target: a model trained like this never stops. The last token of a span "
            "belongs to it.",
        ),
        Wrong(
            "without the end, or the last before the cut",
            SAID,
            "said = ((starts <= place) & (place < ends.clamp(max=length) - 1)).any(dim=0)",
            "The last token of each answer is not a target, be it the end of message or the last before the cut: all "
            "of a span that is in the row counts.",
        ),
        Wrong(
            "one too many",
            SAID,
            "said = ((starts <= place) & (place <= ends)).any(dim=0)",
            "The token after each answer is a target as well: the end of a span is one past its last token.",
        ),
        Wrong(
            "one too many, but no padding",
            SAID,
            "said = ((starts <= place) & (place <= ends)).any(dim=0) & (place < len(ids))",
            "The token after an answer is a target as well: the end of a span is one past its last token.",
        ),
        Wrong(
            "shifted spans",
            SAID,
            "said = ((starts < place) & (place <= ends)).any(dim=0)",
            "Your targets lie one place too late: the first token of each answer is missing and the token after it is "
            "learnt. Labels stand at the token's own place.",
        ),
        Wrong(
            "shifted spans, but no padding",
            SAID,
            "said = ((starts < place) & (place <= ends)).any(dim=0) & (place < len(ids))",
            "Your targets lie one place too late: the first token of each answer is missing, the token after it is "
            "learnt if there is one. Labels stand at the token's own place.",
        ),
        Wrong(
            "first answer only",
            SPANS,
            "starts, ends = spans[:1, :1], spans[:1, 1:]",
            "Only the first answer is a target: use all spans.",
        ),
        Wrong(
            "last answer only",
            SPANS,
            "starts, ends = spans[-1:, :1], spans[-1:, 1:]",
            "Only the last answer is a target: use all spans.",
        ),
        Wrong(
            "from the first answer on",
            SAID,
            "said = (starts <= place).any(dim=0) & (place < ends).any(dim=0)",
            "Everything from the first answer to the last is a target, the user's later messages too: a token must lie "
            "inside one and the same span.",
        ),
        Wrong(
            "all tokens",
            GIVE,
            "return row, row.masked_fill(place >= len(ids), IGNORE)",
            "Every token is a target, as in pre-training: mask what lies outside the spans.",
        ),
        Wrong(
            "all tokens and the padding",
            GIVE,
            "return row, row.clone()",
            "The labels are the whole row, padding included: mask what lies outside the spans.",
        ),
        Wrong(
            "the wrong half",
            GIVE,
            "return row, row.masked_fill(said | (place >= len(ids)), IGNORE)",
            "You mask the answers and learn the prompts: it is the other way round.",
        ),
        Wrong(
            "shifted already",
            GIVE,
            "return row, row.masked_fill(~said, IGNORE).roll(-1)",
            "You shift the labels, and the loss will shift them again: the model would learn the token after the next. "
            "labels[i] is about row[i].",
        ),
        Wrong(
            "padding found by its id",
            GIVE,
            "return row, row.masked_fill(~said | (row == pad), IGNORE)",
            "Tokens are masked because they equal `pad`. Where the end of message is also the padding, the model never "
            "learns to stop: what is padding follows from the place.",
        ),
        Wrong(
            "zero instead of -100",
            GIVE,
            "return row, row.masked_fill(~said, 0)",
            "Masked labels are 0, which is a token like any other: the loss ignores -100 only.",
        ),
        Wrong(
            "padding instead of -100",
            GIVE,
            "return row, row.masked_fill(~said, pad)",
            "Masked labels are `pad`, which the loss does not ignore: it ignores -100 only.",
        ),
        Wrong(
            "the beginning is cut",
            FILL,
            "row[: len(ids)] = ids[-length:]",
            "A conversation that is too long lost its beginning, and the spans no longer fit: cut its end.",
        ),
        Wrong(
            "a cut answer is closed",
            FILL,
            "row[: len(ids)] = torch.cat([ids[: length - 1], ids[-1:]]) if len(ids) > length else ids",
            "You close a cut conversation with its last token: that would teach the model to stop in mid-sentence.",
        ),
        Wrong(
            "filled on the left",
            FILL,
            "row[length - len(ids) if length > len(ids) else 0 :] = ids[:length]",
            "The padding stands on the left, and the spans no longer fit: fill on the right.",
        ),
        Wrong(
            "all on the left",
            FILL + PLACE,
            "shift = max(length - len(ids), 0)\n    row[shift:] = ids[:length]\n"
            "    place = torch.arange(length, device=ids.device) - shift\n",
            "The padding stands on the left, and the labels moved with it: fill on the right.",
        ),
    ),
    also_wrong=(
        Wrong(
            "span without the end of message",
            "spans.append((start, len(ids)))",
            "spans.append((start, len(ids) - 1))",
            "The end of message is the assistant's to say.",
        ),
        Wrong(
            "span with a piece of the header",
            "start = len(ids)\n",
            "start = len(ids) - 1\n",
            "The header is written by the template.",
        ),
        Wrong(
            "tools teach",
            'if message["role"] == "assistant":',
            'if message["role"] in ("assistant", "tool"):',
            "What a tool says is no target.",
        ),
        Wrong(
            "contents command",
            'tokenizer.encode(message["content"].strip())',
            'tokenizer.encode(message["content"].strip(), allowed=tokenizer.special)',
            "A content must not hold special tokens.",
        ),
        Wrong(
            "contents not trimmed",
            'tokenizer.encode(message["content"].strip())',
            'tokenizer.encode(message["content"])',
            "Llama 3's template trims contents.",
        ),
        Wrong(
            "a gap in the ids",
            "name: old.size + i for",
            "name: old.size + i + 1 for",
            "New tokens take the first free ids.",
        ),
        Wrong(
            "worst fit",
            "row = min(free, key=lambda row: room[row])",
            "row = max(free, key=lambda row: room[row])",
            "Best fit takes the fullest row that has room.",
        ),
        Wrong(
            "first fit",
            "row = min(free, key=lambda row: room[row])",
            "row = free[0]",
            "Best fit takes the fullest row that has room.",
        ),
        Wrong(
            "in the order given",
            "key=lambda i: -sizes[i]",
            "key=lambda i: i",
            "The longest come first.",
        ),
        Wrong(
            "first token of a conversation a target",
            "made.labels[number, at] = IGNORE",
            "made.labels[number, 0] = IGNORE",
            "The token before it is another conversation's.",
        ),
        Wrong(
            "one document a row",
            "made.documents[place] = i",
            "made.documents[place] = number",
            "Every conversation has a number of its own.",
        ),
        Wrong(
            "no mask between conversations",
            "positions=places, visible=mask)",
            "positions=places)",
            "Without the mask packed conversations read each other.",
        ),
        Wrong(
            "packed labels not shifted",
            "batch.labels[:, 1:].flatten()",
            "batch.labels[:, :-1].flatten()",
            "The state at i is judged by the label at i + 1.",
        ),
        Wrong(
            "labels ignored",
            LOSS,
            "return next_token_loss(logits, labels.clamp(min=0))",
            "Masked labels are no targets.",
        ),
        Wrong(
            "shifted twice",
            LOSS,
            "return next_token_loss(logits[:, :-1], labels[:, 1:].clamp(min=0), ignore=(labels == IGNORE)[:, 1:])",
            "The loss shifts once.",
        ),
        Wrong(
            "counts from the symbol itself",
            "torch.arange(1, ANSWER + 1)",
            "torch.arange(ANSWER)",
            "The answer begins with the next symbol.",
            TOY,
        ),
        Wrong(
            "turns start at the symbol",
            "lambda start, end: (end - TURN, end)",
            "lambda start, end: (end - TURN + 1, end)",
            "All tokens are targets, the first of a turn too.",
            TOY,
        ),
    ),
    hints=(
        "Fill a row with `pad`, write the first `length` ids into it, and only then think about labels.",
        "A place lies in some span if start <= place < end: compare torch.arange(length) with all spans at once.",
        "row.masked_fill(~inside, -100) keeps the token where it is a target. Nothing needs the id of the padding.",
    ),
)
