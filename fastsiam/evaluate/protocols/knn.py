"""k-nearest-neighbour accuracy of frozen features (Wu et al. 2018), for several k and temperatures from one search.

Unit features of --val are compared with those of --train; each of the k most similar votes for its class with
exp(cosine / T). The search is exact, over features in half precision.
"""

import argparse
from itertools import product

from fastsiam.errors import UserError
from fastsiam.evaluate.knn import accuracy, nearest
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, add_labelled_arguments
from fastsiam.evaluate.protocols.features import features, labelled_rows
from fastsiam.evaluate.protocols.inputs import opened
from fastsiam.evaluate.protocols.result import publish, results_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder_arguments(parser)
    add_labelled_arguments(parser)
    parser.add_argument("--k", type=_list_of(int), default=[20, 200], metavar="K,...", help="neighbours (20,200)")
    text = "divisors of the cosine in a vote (0.07,0.1,0.2)"
    default = [0.07, 0.1, 0.2]
    parser.add_argument("--temperature", type=_list_of(float), default=default, metavar="T,...", help=text)


def run(arguments: argparse.Namespace) -> None:
    for key, least in (("k", 1), ("temperature", 1e-6)):
        for value in getattr(arguments, key):
            if not value >= least:
                raise UserError(f"--{key}: {value:g} is below {least:g}", "out-of-range")
    with opened(arguments) as inputs:
        train, val, label_of = inputs.labelled()
        inputs.fill_statistics(train)
        bank = features(inputs, train, "--train", labelled_rows(train))
        queries = features(inputs, val, "--val", labelled_rows(val))
        # Two k above the size of the bank are one.
        ks = list(dict.fromkeys(min(k, len(bank.rows)) for k in arguments.k))
        temperatures = list(dict.fromkeys(arguments.temperature))
        similarity, places = nearest(bank.rows, queries.rows, max(ks))
        labels = bank.labels.to(places.device)[places]
        truth = label_of[queries.labels].to(places.device)
        voted = truth, len(train.classes)
        found = {
            (k, temperature): accuracy(similarity[:, :k], labels[:, :k], *voted, temperature)
            for k, temperature in product(ks, temperatures)
        }
        numbers = {
            f"{name}_k{k}_T{temperature:g}": value
            for (k, temperature), percent in found.items()
            for name, value in percent._asdict().items()
        }
        table = [
            {"k": k, "T": f"{temperature:g}", "top-1, %": percent.top1, "top-5, %": percent.top5}
            for (k, temperature), percent in found.items()
        ]
        settings = {
            "epoch": "last",
            "features": "offline",
            "metric": "cosine",
            "votes": "exp(cosine / T)",
            "feature_dtype": "fp16",
            "dim": bank.rows.shape[1],
        }
        data = {
            "train": str(train.root),
            "val": str(val.root),
            "train_images": len(bank.rows),
            "val_images": len(queries.rows),
            "classes": len(train.classes),
            "decoder": bank.decoder,
        }
        publish("knn", {"k": ks, "temperature": temperatures, **settings}, numbers, inputs, data, table)
        folder = results_folder(inputs)
        if folder is None:
            return
        # Matplotlib takes 0.4 s to import, which an encoder outside of a run folder need not wait for.
        from fastsiam.evaluate.protocols.pictures import confusion, write_confusion, write_pictures

        name, k, temperature = arguments.encoder.name, ks[0], temperatures[0]
        title = f"kNN of {name}{' (untrained)' if arguments.untrained else ''}, last epoch, offline"
        write_pictures(folder, inputs, train, val, bank, queries, title)
        matrix = confusion(similarity[:, :k], labels[:, :k], *voted, temperature)
        write_confusion(folder, matrix, list(train.classes), f"{title}, k {k}, T {temperature:g}")


def _list_of(kind):
    def parse(text):
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 20,200") from None

    return parse
