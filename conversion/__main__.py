"""``python -m hf_sparse.conversion`` does what ``hf-sparse convert`` does."""

from hf_sparse.console import make_app, run
from hf_sparse.conversion.command import convert_command

if __name__ == "__main__":
    app = make_app()
    app.command()(convert_command)
    run(app, "python -m hf_sparse.conversion")
