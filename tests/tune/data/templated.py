"""The small tokenizer with a chat template."""

import shutil

from fixtures_tokenizer import make_config

from qwenfit.checkpoint.tokenizer import load_tokenizer


def with_template(small_folder, tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("templated") / "model"
    shutil.copytree(small_folder, folder)
    (folder / "chat_template.jinja").write_text(source)
    return load_tokenizer(folder, make_config(1000))
