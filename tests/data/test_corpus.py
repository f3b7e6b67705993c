"""The shipped text, rows in which no document sees another, and a loader that goes on exactly where it stopped."""

import hashlib
import io
import json
import lzma
import struct
import tarfile
import zlib
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from minillm.data import corpus
from minillm.data.bpe import train
from minillm.data.corpus import Loader, Rows, document_mask, documents, pack, positions, token_bytes
from tools import corpus as builder

# The shipped text


def test_every_twentieth_chapter_is_held_out():
    everything = lzma.decompress(corpus.AUSTEN.read_bytes()).decode().split("\f")
    assert len(everything) == 50 + 61 + 48 + 55 + 31 + 24  # chapters of the six novels
    held_out = [everything[i - 1] for i in range(20, 270, 20)]
    assert documents("held_out") == held_out
    assert documents("train") == [text for text in everything if text not in held_out]
    assert len(documents("train")) == 256


def test_the_text_is_the_novels_alone():
    texts = documents("train") + documents("held_out")
    whole = "\n\n".join(texts)
    assert 3.9e6 < len(whole.encode()) < 4.1e6
    assert texts[0].startswith("The family of Dashwood had long been settled in Sussex. Their estate was large")
    opening = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
    )
    assert sum(text.startswith(opening) for text in texts) == 1
    for foreign in ("_", "*", "  ", "\t", "\r", "\f", "Gutenberg", "Constable", "Signet", "CHAPTER", "FINIS", "[End"):
        assert foreign not in whole
    assert not any(text != text.strip() or "\n\n\n" in text for text in texts)


def test_paragraphs_are_one_line():
    paragraphs = [p for text in documents("train") for p in text.split("\n\n")]
    assert sum("\n" in p for p in paragraphs) < 40  # verse and signatures of letters
    assert max(map(len, paragraphs)) > 2000


def test_refuses_another_split():
    with pytest.raises(ValueError, match="must be 'train' or 'held_out', got 'test'"):
        documents("test")


# The script that made it


def test_lines_become_paragraphs_and_verse_keeps_its_lines():
    assert builder.paragraph(["Sorrow came--a gentle", "sorrow--but  _not_ at all well-", "known--"]) == (
        "Sorrow came--a gentle sorrow--but not at all well-known--"
    )
    assert builder.paragraph(["She stopped", "--and sat--", "down."]) == "She stopped--and sat--down."
    assert builder.paragraph(["    My first doth", '      "Which my second']) == 'My first doth\n"Which my second'
    assert builder.paragraph(["     I have just had the", "     honour of it."]) == "I have just had the honour of it."


def test_chapters_without_headings_and_additions():
    lines = ["EMMA", "", "by", "", "VOLUME I", "", "CHAPTER I", "", "One.", "Two.", "", "VOLUME II", "", "Chapter 2"]
    lines += ["", "   * * *", "", "Three.", "", "", "[At this point in the first", "edition, Volume 1 ends.]", ""]
    lines += ["FINIS", "", "Printed."]
    assert builder.chapters(lines) == ["One. Two.", "Three."]


def r_string(text):
    return struct.pack(">ii", 9 | 8 << 12, len(text.encode())) + text.encode()


def r_list(kind, items, names=None):
    """R's binary form of a list (19), strings (16) or whole numbers (13), with names as the one attribute."""
    data = struct.pack(">ii", kind | (0x200 if names else 0), len(items)) + b"".join(items)
    if names:
        symbol = struct.pack(">i", 1) + r_string("names")
        data += struct.pack(">i", 2 | 0x400) + symbol + r_list(16, [r_string(name) for name in names])
        data += struct.pack(">i", 254)
    return data


def test_reads_novels_from_a_package(tmp_path):
    header = b"X\n" + struct.pack(">iii", 2, 0, 0)
    lines = header + r_list(16, [r_string("Chapter 1"), r_string(""), r_string("Ünder £5.")])
    piece = struct.pack(">i", len(lines)) + zlib.compress(lines)
    place = r_list(13, [struct.pack(">i", 3), struct.pack(">i", len(piece))])
    index = header + r_list(19, [r_list(19, [place], ["emma"])], ["variables"])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for suffix, data in ((".rdx", zlib.compress(index)), (".rdb", b"xxx" + piece)):
            member = tarfile.TarInfo(builder.FOLDER + suffix)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    members = {"debian-binary": b"2.0", "data.tar.xz": packed.getvalue()}
    package = b"!<arch>\n"
    for name, data in members.items():
        package += f"{name:<48}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path = tmp_path / "novels.deb"
    path.write_bytes(package)
    assert builder.read_novels(path) == {"emma": ["Chapter 1", "", "Ünder £5."]}


def test_refuses_what_is_no_package(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no Debian package"):
        builder.read_novels(tmp_path / "x.deb")


# Rows


def test_rows_by_hand():
    # 1 2 3 eos | 4 eos | eos | 5 6 eos: ten tokens in rows of three, the last token is left over
    rows = pack([[1, 2, 3], [4], [], [5, 6]], 3, eos=9)
    assert rows.ids.tolist() == [[1, 2, 3], [9, 4, 9], [9, 5, 6]]
    assert rows.documents.tolist() == [[0, 0, 0], [0, 1, 1], [2, 3, 3]]
    assert rows.ids.dtype == rows.documents.dtype == torch.int64


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_no_token_is_lost_or_moved_but_the_remainder(length):
    sizes = torch.randint(0, 30, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    rows = pack(tokens, length, eos=-1)
    expected = [token for document in tokens for token in [*document, -1]]
    flat = rows.ids.flatten().tolist()
    assert flat == expected[: len(flat)]
    assert 0 <= len(expected) - len(flat) < length
    for token, number in zip(flat, rows.documents.flatten().tolist(), strict=True):
        assert token in (-1, *tokens[number])
    assert rows.ids.shape == rows.documents.shape == (len(expected) // length, length)


def test_refuses_rows_longer_than_the_text():
    with pytest.raises(ValueError, match="a row needs 6 tokens, the documents have 5"):
        pack([[1, 2], [3]], 6, eos=0)


# Documents kept apart

PACKED = torch.tensor([[3, 3, 3, 4, 4, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5, 5], [5, 6, 7, 7, 7, 7, 7, 8]])


def test_mask_is_that_of_pytorch():
    from torch.nn.attention.flex_attention import create_mask

    def same_document_not_later(b, h, q, k):
        return (PACKED[b, q] == PACKED[b, k]) & (q >= k)

    assert torch.equal(document_mask(PACKED), create_mask(same_document_not_later, 3, 1, 8, 8, device="cpu")[:, 0])


def test_positions_are_those_of_transformers():
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_tensors="pt")
    for row, ours in zip(PACKED, positions(PACKED), strict=True):
        pieces = [{"input_ids": row[row == number].tolist()} for number in row.unique()]
        assert collate(pieces)["position_ids"][0].tolist() == ours.tolist()


def test_transformers_finds_the_documents_in_our_positions():
    from transformers.masking_utils import find_packed_sequence_indices

    found = find_packed_sequence_indices(positions(PACKED))
    assert torch.equal(document_mask(found), document_mask(PACKED))


def test_a_document_in_a_row_is_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 3, 1, 8, 4, generator=generator, dtype=torch.float64)
    together = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(PACKED)[:, None])
    for b, row in enumerate(PACKED):
        for number in row.unique():
            mine = row == number
            alone = F.scaled_dot_product_attention(*(x[b : b + 1, :, mine] for x in (q, k, v)), is_causal=True)
            torch.testing.assert_close(together[b : b + 1, :, mine], alone)


def test_nothing_of_another_document_reaches_a_token():
    x = torch.randn(3, 1, 8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=document_mask(PACKED)[:, None])
    out[0, 0, 5:].square().sum().backward()  # the third document of the first row
    assert x.grad[0, 0, :5].abs().max() == 0
    assert x.grad[1:].abs().max() == 0
    assert x.grad[0, 0, 5:].abs().min() > 0


# The loader


def numbered(count, length=4):
    """Rows whose tokens are their own numbers."""
    ids = torch.arange(count)[:, None].expand(count, length)
    return Rows(ids, ids + 1000)


def take(loader, count):
    return [batch.ids[:, 0].tolist() for _, batch in zip(range(count), loader, strict=False)]


def test_an_epoch_is_every_row_once_in_an_order_of_its_own():
    loader = Loader(numbered(12), 3)
    epochs = [list(chain(*take(loader, 4))) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert list(range(12)) not in epochs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Loader(numbered(12), 3, seed=1)
    assert list(chain(*take(other, 4))) not in epochs


def test_rows_that_fill_no_batch_are_left_for_the_next_epoch():
    loader = Loader(numbered(11), 4)
    first, second = take(loader, 2), take(loader, 2)
    assert len({*first[0], *first[1]}) == len({*second[0], *second[1]}) == 8
    assert {*first[0], *first[1]} != {*second[0], *second[1]}


def test_batches_carry_the_documents():
    batch = next(Loader(numbered(6), 2))
    assert batch.ids.shape == batch.documents.shape == (2, 4)
    assert torch.equal(batch.documents, batch.ids + 1000)


@pytest.mark.parametrize("at", range(9))  # 4 batches an epoch: also at its ends, and in the third
def test_resumes_with_the_very_same_batches(at):
    loader = Loader(numbered(13), 3, seed=7)
    take(loader, at)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 9)
    resumed = Loader(numbered(13), 3, seed=7)
    take(resumed, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 9) == expected
    assert resumed.state_dict() == loader.state_dict()


def test_order_neither_reads_nor_moves_the_global_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = take(Loader(numbered(12), 3), 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert take(Loader(numbered(12), 3), 8) == first


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: Loader(numbered(12), 3, seed=1), "seed 0, this loader has seed 1"),
        (lambda: Loader(numbered(12), 4), "batch 3, this loader has batch 4"),
        (lambda: Loader(numbered(13), 3), "rows 12, this loader has rows 13"),
        (lambda: Loader(numbered(12, 5), 3), "length 4, this loader has length 5"),
    ],
)
def test_refuses_the_position_of_another_loader(other, name):
    state = Loader(numbered(12), 3).state_dict()
    with pytest.raises(ValueError, match=name):
        other().load_state_dict(state)


@pytest.mark.parametrize("batch", [0, 13])
def test_refuses_batches_that_cannot_be_filled(batch):
    with pytest.raises(ValueError, match=f"must hold 1 to 12 rows, which is all there are, got {batch}"):
        Loader(numbered(12), batch)


# Bytes


def test_token_bytes_add_up_to_the_text():
    text = documents("held_out")[0] + " naïve 好" * 200  # often enough to be tokens of several bytes
    tokenizer = train([text], 500)
    ids = torch.tensor(tokenizer.encode(text))
    lengths = token_bytes(tokenizer)
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[list(tokenizer.special.values())].tolist() == [0, 0, 0]
    assert lengths.shape == (500,)


def test_the_shipped_file_is_the_one_described():
    text = lzma.decompress(corpus.AUSTEN.read_bytes())
    digest = hashlib.sha256(text).hexdigest()
    assert digest in corpus.AUSTEN.with_name("ORIGIN.md").read_text(encoding="utf-8")
