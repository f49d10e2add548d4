"""fastsiam COMMAND ...: runs python -m fastsiam.COMMAND ..."""

import argparse
import sys
from importlib import import_module

import fastsiam

COMMANDS = {
    "train": "pretrain an encoder, or resume a run",
    "sweep": "train many runs and compare them in one table",
    "experiments": "repeat an experiment of the SimSiam paper, beside its numbers",
    "config": "print what the keys of a config mean, with range and default",
    "embed": "write the features of images, or show nearest neighbours",
    "plan": "measure for a minute, then predict time, energy and cost of a run",
    "evaluate": "measure a trained encoder by kNN and other protocols",
    "prepare": "scan, pack or convert images",
    "report": "write one HTML page of one run or several",
    "replay": "make a step of a run again: its views, its loss, its gradients",
    "follow": "copy the numbers of a run into Weights & Biases or MLflow",
    "export": "write an encoder for torchvision, timm, ONNX, detectron2 or transformers",
    "doctor": "check what is installed, and the machine",
}


def main(argv: list[str] | None = None) -> int:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="fastsiam",
        description="Self-supervised pretraining of image encoders at hardware speed.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
        + "\n\nfastsiam COMMAND --help prints more. Start with: fastsiam train --config quickstart.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fastsiam {fastsiam.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    module = arguments.command if arguments.command == "train" else f"{arguments.command}.__main__"
    return import_module(f"fastsiam.{module}").main(arguments.arguments)


if __name__ == "__main__":
    sys.exit(main())
