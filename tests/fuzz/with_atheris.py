"""The judge under atheris, which finds inputs by the branches they reach. Optional: atheris is no part of any extra.

``pip install atheris; python -m tests.fuzz.with_atheris safetensors [options of libFuzzer] [folder of a corpus]``.
A finding is a file that libFuzzer writes; ``bytes.fromhex`` of its content makes a test. Pure Python is instrumented,
so what it reaches in torch and zlib it does not see.
"""

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz the loader of one kind; ends when libFuzzer does."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    with atheris.instrument_imports(include=["odewei.loaders"]):  # before anything else imports them
        from .cases import KINDS, make_case
        from .child import WARM_UP_NBYTES, limit_memory
        from .judge import judge, watch_the_process
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m tests.fuzz.with_atheris {{{','.join(KINDS)}}} [options of libFuzzer]")
    kind = sys.argv.pop(1)
    frame = make_case(0, 0, kind)
    watch_the_process()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "case"
        judge(frame, place)
        limit_memory(WARM_UP_NBYTES)
        atheris.Setup(sys.argv, lambda content: judge(frame.with_content(content), place))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
