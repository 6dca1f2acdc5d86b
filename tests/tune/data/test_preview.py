"""What a preview shows."""

from qwenfit.tune.batch import IGNORE, Sample
from qwenfit.tune.data.dataset import load_samples
from qwenfit.tune.data.preview import MAX_TOKENS, preview_text

ROW = '{"instruction": "Hi", "output": "Yo"}'


def test_trained_tokens_stand_between_brackets_and_are_counted(write, small):
    path = write(f"{ROW}\n{ROW}")
    got = load_samples([path], small, "assistant_only", 100)
    text = preview_text(got.samples, small, 1, colour=False)
    learned = len(small.encode("Yo")) + 1
    length = len(got.samples[0].input_ids)
    assert text.splitlines() == [
        f"{path}:1: {length} tokens, {learned} trained",
        "<|im_start|>system↵",
        "You are a helpful assistant.<|im_end|>↵",
        "<|im_start|>user↵",
        "Hi<|im_end|>↵",
        "<|im_start|>assistant↵",
        "⟦Yo<|im_end|>⟧↵",
        "",
        "",
        f"1 of 2 samples; {2 * length} tokens, {2 * learned} trained.",
    ]


def test_colour_marks_the_same_tokens(write, small):
    got = load_samples([write(ROW)], small, "assistant_only", 100)
    assert "\x1b[32mYo<|im_end|>\x1b[0m" in preview_text(got.samples, small, 1, colour=True)


def test_data_cannot_steer_the_terminal(write, small):
    got = load_samples([write('{"text": "a\\u001b]0;owned\\u0007\\u202eb\\r\\u009bc"}')], small, "all", 100)
    text = preview_text(got.samples, small, 1, colour=False)
    assert "a\\x1b]0;owned\\x07\\u202eb\\r\\x9bc" in text
    assert not set(text) & set("\x1b\x07\u202e\r\x9b")


def test_a_very_long_sample_is_cut_in_the_preview_and_says_so(small):
    ids = small.encode("a") * (MAX_TOKENS + 1500)
    text = preview_text([Sample(ids, [IGNORE] * len(ids), "f:1")], small, 3, colour=False)
    assert text.count("a") < MAX_TOKENS + 100 and "... and 1,500 tokens more" in text
