"""fastsiam.train without training: leaves the files of a run at once, or ends as its config's values tell it to.

optimizer.base_lr is its quality: kNN is 10 * base_lr + seed, of a whole run. 3: refused, 5: collapses, 7: killed, 9:
trains until a signal comes. Each start is a line of run.dir/starts.txt.
"""

import json
import os
import signal
import sys
import time

from fastsiam.config import load_config

FIELDS = {"epoch": 0, "train_seconds": 2.0, "wall_seconds": 3.0, "spent_seconds": 4.0}


def main():
    config = load_config(sys.argv[2], sys.argv[3:])
    folder, quality = os.path.join(config.run.dir, config.run.name), config.optimizer.base_lr
    environment = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    start = {"name": config.run.name, "share": config.train.max_share, "budget": config.budget, **environment}
    with open(os.path.join(config.run.dir, "starts.txt"), "a") as file:
        file.write(
            json.dumps(start | {"workers": config.data.workers, "leads_session": os.getsid(0) == os.getpid()}) + "\n"
        )
    if quality == 3:
        print("fastsiam: data.train: nowhere is not a folder [no-such-folder]")
        return 2
    if quality == 7:
        print("a line", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.yaml"), "w") as file:
        file.write(config.to_yaml())
    if quality == 9 and not os.path.exists(os.path.join(folder, "saved")):
        caught = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda came, _: caught.append(came))
        open(os.path.join(folder, "trains"), "w").close()
        while not caught:
            time.sleep(0.01)
        open(os.path.join(folder, "saved"), "w").close()
        return 128 + caught[0]
    ends = {"status": "collapsed", "reason": "z has collapsed"} if quality == 5 else {"status": "done"}
    step = round(100 * config.train.max_share)
    score = 10 * quality + config.train.seed - (1 - config.train.max_share)
    where = {"step": step, "images_seen": 8 * step, **FIELDS}
    lines = [{"kind": "train", **where, "loss": -quality / 10, "progress": config.train.max_share}]
    lines += [{"kind": "collapse", **where, "std_ratio": 0.5 + config.train.seed / 10}]
    lines += [{"kind": "knn", **where, "knn_top1": score}] if config.data.val == "data/demo/val" else []
    lines += [{"kind": "spectrum", **where, "rankme": 2 * score}]
    with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with open(os.path.join(folder, "status.json"), "w") as file:
        json.dump(ends | {"step": step}, file)
    return 3 if quality == 5 else 0


if __name__ == "__main__":
    sys.exit(main())
