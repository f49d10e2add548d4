#!/usr/bin/env bash
# First light on a machine with a GPU that has no network: everything worth knowing in 8.5 minutes, most valuable first.
# For a machine that is reached in calls of at most ten minutes and 64 MiB. It ends within its minutes whatever fails,
# each part has its own limit, and after each part everything so far lies in $OUT as one archive.
#
# PREPARATION, in the root of a clean checkout (the tree that travels is the one that is measured), before the GPU is held:
#     bash benchmarks/first_light.sh prepare CIFAR10 PHOTOGRAPHS
#   CIFAR10: an archive that `python -m fastsiam.prepare cifar10` reads; PHOTOGRAPHS: a folder of JPEGs, of some MiB.
#   Takes 3 to 10 minutes, most of it xz. Writes into .gpu, which git ignores, and prints the sizes in MiB:
#     .gpu/a           wheels for Python 3.12 of what images with torch may lack, both data sets, and COMMIT, which says
#                      what commit the tree is
#     .gpu/b0, b1      DALI for CUDA 13 and Python 3.12 in one or two parts of at most 56 MiB in place of eight, without
#                      symbols, headers and the GPU code of other chips
#
# ON THE GPU MACHINE, in a copy of the tree with the named folder beside it, OUT set to a folder for results:
#   1. with .gpu/a:   bash benchmarks/first_light.sh                          all but DALI, 8.5 minutes (limit 530 s)
#   2. with .gpu/b0:  bash benchmarks/first_light.sh stage                    seconds, only where there is a b1
#   3. with the last: MINUTES=3.5 bash benchmarks/first_light.sh dali         DALI's share (limit 230 s)
#   If the first failed early, read summary.txt, mend, and run again with ONLY="name name" for what is missing.
#   $OUT holds first_light.tgz (logs, JSON lines, profiles) and summary.txt; save them before the next call.
#   Afterwards: unpack, put results/*.jsonl into benchmarks/results/<date>_<machine>/, write predicted, measured and why
#   into benchmarks/LOG.md, and run python -m benchmarks.tables.
#
# Variables: MINUTES (8.5; of this call), ONLY ("step50 loss", names of parts), DEVICE (cuda; cpu for a trial), TINY (1:
# smallest sizes), PATIENCE (1; so many times each limit, for a trial on a slow machine), WORK (/tmp/first_light), PYTHON.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD gpu=$PWD/.gpu
PYTHON=${PYTHON:-python3}

# ---------------------------------------------------------------------------------------------------- preparation
prepare() {
    local cifar10=${1:?prepare CIFAR10 PHOTOGRAPHS} photographs=${2:?prepare CIFAR10 PHOTOGRAPHS} work part
    set -e
    [[ -z $(git status --porcelain -- . ':(exclude)benchmarks/results') ]] || { echo "commit first: results name the commit" >&2; exit 1; }
    mkdir -p "$gpu/a/wheels"
    { git rev-parse HEAD; git ls-tree -r HEAD; } > "$gpu/a/COMMIT"
    cp "$cifar10" "$gpu/a/"
    basename "$cifar10" > "$gpu/a/cifar10.name"
    tar cf "$gpu/a/photographs.tar" -C "$photographs" .
    local pip=("$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    "${pip[@]}" -d "$gpu/a/wheels" pydantic annotated-types typing-inspection typing-extensions filelock jinja2 markupsafe \
        psutil pyyaml rich markdown-it-py mdurl pygments safetensors
    # pydantic names the one pydantic-core that it takes.
    local core; core=$(unzip -p "$gpu"/a/wheels/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
    "${pip[@]}" -d "$gpu/a/wheels" "pydantic-core==$core"
    if [[ ! -s $gpu/b0/dali.tar.xz.0 ]]; then
        work=$(mktemp -d)
        "${pip[@]}" -d "$work/wheels" nvidia-dali-cuda130==2.4.0 'nvidia-nvimgcodec-cu13<0.10' nvidia-nvjpeg \
            optree nvtx makefun 'libcst~=1.8' gast==0.7.0 astunparse six==1.17.0
        mkdir "$work/site"
        for part in "$work"/wheels/*.whl; do unzip -q -o "$part" -d "$work/site"; done
        slim "$work/site"
        tar c -C "$work/site" . | xz -T2 --x86 --lzma2=preset=6,dict=64MiB > "$work/dali.tar.xz"
        split -b 56M -d -a 1 "$work/dali.tar.xz" "$work/dali.tar.xz."
        for part in "$work"/dali.tar.xz.?; do
            mkdir -p "$gpu/b${part##*.}" && mv "$part" "$gpu/b${part##*.}/"
        done
        rm -rf "$work"
    fi
    du -sm "$gpu"/*
}

slim() {
    # Headers, other Pythons, symbols, the GPU code of other chips, and codecs whose libraries are not packed.
    find "$1" -name '*.so' | grep -E 'cpython-(39|310|311|313t?|314t?|315t?)-' | xargs -r rm -f
    rm -rf "$1"/nvidia/dali/include "$1"/nvidia/nvimgcodec/include "$1"/nvidia/dali/test
    rm -f "$1"/nvidia/nvimgcodec/extensions/libnv{jpeg2k,tiff}_ext.so*
    find "$1" -name '*.pyi' -delete
    find "$1" -type f \( -name '*.so' -o -name '*.so.*' \) -print0 | while IFS= read -r -d '' library; do
        strip --strip-unneeded "$library" 2> /dev/null || true
        "$PYTHON" benchmarks/harness/slim.py "$library"
    done
}

what=${1:-main}
if [[ $what == prepare ]]; then
    prepare "${@:2}"
    exit
fi

# ---------------------------------------------------------------------------------------------------- the machine
MINUTES=${MINUTES:-8.5} DEVICE=${DEVICE:-cuda} TINY=${TINY:-} ONLY=${ONLY:-} PATIENCE=${PATIENCE:-1}
OUT=${OUT:?OUT is a folder for results} WORK=${WORK:-/tmp/first_light}
site=$WORK/site
mkdir -p "$OUT" "$WORK"/{a,b,logs,results,profiles,site}
# The next call may have something else in the place of these folders; parts of DALI come one a call.
cp -r "$gpu/a/." "$WORK/a/" 2> /dev/null
cp "$gpu"/b?/dali.tar.xz.? "$WORK/b/" 2> /dev/null
if [[ $what == stage ]]; then
    ls -l "$WORK"/a "$WORK"/b
    exit
fi
[[ -e .git || ! -e $WORK/a/COMMIT ]] || cp "$WORK/a/COMMIT" .
export PYTHONUNBUFFERED=1 PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" TQDM_DISABLE=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME="$WORK/cache" TORCHINDUCTOR_CACHE_DIR="$WORK/inductor" TRITON_CACHE_DIR="$WORK/triton"
# As fastsiam.train sets it for itself.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export DEVICE WORK PYTHON root
deadline=$(awk "BEGIN { print int($(date +%s) + 60 * $MINUTES) }")
summary=$OUT/summary.txt
echo "$(date -u +%FT%TZ) $what, $MINUTES minutes, device $DEVICE" | tee -a "$summary"

left() { echo $((deadline - $(date +%s))); }
wanted() { [[ -z $ONLY || " $ONLY " == *" $1 "* ]]; }

bundle() { # whole or not at all, and well below 16 MiB
    tar czf "$OUT/.first_light.tgz" -C "$WORK" --exclude=images --exclude='*.npz' --exclude='*.pt' logs results profiles 2> /dev/null
    mv -f "$OUT/.first_light.tgz" "$OUT/first_light.tgz"
}

part() { # NAME SECONDS COMMAND: runs it within its limit and what is left, notes how it ended, bundles
    local name=$1 limit=$(($2 * PATIENCE)) command=$3 began code
    wanted "$name" || return 0
    (($(left) - 6 < limit)) && limit=$(($(left) - 6))
    if ((limit < 8)); then
        echo "$name: not begun, the time is over" | tee -a "$summary"
        return 0
    fi
    began=$(date +%s)
    timeout -k 3 "$limit" bash -o pipefail -c "$command" > "$WORK/logs/$name.log" 2>&1
    code=$?
    echo "$name: rc $code, $(($(date +%s) - began)) s of $limit" | tee -a "$summary"
    ((code)) && tail -n 6 "$WORK/logs/$name.log" | cut -c1-300 | sed 's/^/    /'
    bundle
}

pids=() names=()
background() { # NAME SECONDS COMMAND: beside the parts that follow, until `wait_for`
    wanted "$1" || return 0
    timeout -k 3 "$(($2 * PATIENCE))" bash -o pipefail -c "$3" > "$WORK/logs/$1.log" 2>&1 &
    pids+=("$!")
    names+=("$1")
}

wait_for() {
    local i
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        echo "${names[$i]}: rc $? (beside others)" | tee -a "$summary"
    done
    pids=() names=()
    bundle
}

small=() B50=512 B18=512 CIFAR=75s RUN=()
if [[ -n $TINY ]]; then
    heads=(method.projector.hidden=64 method.projector.out=64) B50=4 B18=4 CIFAR=null
    small=(--set model.encoder=resnet18 --set views.size=32 --set "${heads[0]}" --set "${heads[1]}")
    RUN=("${heads[@]}" model.encoder=cifar_resnet8 model.width=8 train.batch_size=32 train.epochs=4 views.size=16 data.workers=1 data.store_size=16)
fi
tiny=${TINY:+--tiny}
rows() { # CONFIG BATCH MINUTES ROWS [MORE ...]
    local config=$1 batch=$2 minutes=$3 rows=$4
    shift 4
    [[ -n $TINY ]] && minutes=0.02
    printf '%q ' "$PYTHON" -m benchmarks.harness.profiled --config "$config" --batch "$batch" --minutes "$minutes" --rows "$rows" \
        --device "$DEVICE" --out "$WORK/results" --profiles "$WORK/profiles" "${small[@]}" "$@"
}
bench() { # NAME MINUTES [MORE ...]
    local name=$1 minutes=$2
    shift 2
    local module=("benchmarks.$name")
    [[ -n $TINY ]] && module=(benchmarks.harness.tiny "$name") minutes=0.02
    printf '%q ' "$PYTHON" -m "${module[@]}" --out "$WORK/results" --device "$DEVICE" --minutes "$minutes" "$@"
}
tests() { # the project's own, and their record; modules that cannot be imported here keep no others from running
    local timeout=
    "$PYTHON" -c 'import pytest_timeout' 2> /dev/null && timeout=--timeout=120
    printf '%q ' "$PYTHON" -m pytest -q -rA --durations=15 -p no:cacheprovider --continue-on-collection-errors $timeout "$@"
}

if ! "$PYTHON" -c 'import filelock, jinja2, psutil, pydantic, rich, safetensors, yaml' 2> /dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WORK"/a/wheels/*.whl
fi
photographs=$WORK/photographs
if [[ -e $WORK/a/photographs.tar ]]; then
    mkdir -p "$photographs" && tar xf "$WORK/a/photographs.tar" -C "$photographs"
fi
part versions 40 "nvidia-smi; nvcc --version | tail -n 2; head -n 1 COMMIT; lscpu | grep -E 'Model name|^CPU\(s\)'; free -g | head -n 2; $PYTHON -m fastsiam.doctor"

if [[ $what == main ]]; then
    part ceilings 30 "$PYTHON -m benchmarks.first_light ceilings --device $DEVICE $tiny | tee $WORK/results/ceilings.json"

    # ---- beside the tests, which leave the GPU idle: the compiler's work for what is measured after them, and CIFAR-10
    cifar10=$WORK/a/$(cat "$WORK/a/cifar10.name" 2> /dev/null)
    [[ -f $cifar10 ]] && background cifar_files 150 "$PYTHON -m fastsiam.prepare cifar10 $cifar10 $WORK/cifar10"
    if [[ $DEVICE == cuda ]]; then
        background warm50 185 "$(rows r50_100ep $B50 0 'fastsiam; compile, two calls' --warm)"
        background warm18 170 "$(rows r18_cifar10_800ep $B18 0 fastsiam --warm)"
    fi
    part pytest 175 "$(tests -m gpu); code=\$?; cp -r benchmarks/results/*/gpu_tests.* $WORK/results/ 2> /dev/null; exit \$code"
    wait_for

    # ---- the step beside its eager form, kernels alone, CIFAR-10 from memory with start and compilation included
    if [[ $DEVICE == cuda ]]; then eager='+ fused loss'; else eager='+ one call'; fi
    part step50 90 "$(rows r50_100ep $B50 0.16 "fastsiam; $eager")"
    part loss 35 "$(bench loss 0.3)"
    part augment 40 "$(bench augment 0.3)"
    part cifar 95 "[[ -d $WORK/cifar10/train ]] && $PYTHON -m fastsiam.train --config r18_cifar10_20min data.train=$WORK/cifar10/train data.val=$WORK/cifar10/val budget=$CIFAR train.device=$DEVICE run.dir=$WORK/runs run.name=cifar ${RUN[*]}; code=\$?; mkdir -p $WORK/results/cifar; cp $WORK/runs/cifar/{metrics.jsonl,status.json,environment.json,spent.json} $WORK/results/cifar/ 2> /dev/null; exit \$code"
    # ---- what decisions turn on, in the time that is left
    if [[ $DEVICE == cuda ]]; then
        # In a folder of its own: its rows have the names of step50's.
        part pointwise50 90 "$(rows r50_100ep $B50 0.13 fastsiam --set model.fused_pointwise=true --out "$WORK/results/pointwise")"
        part graphs18 60 "$(rows r18_cifar10_800ep $B18 0.1 "fastsiam; $eager; compile with CUDA graphs")"
        part two50 80 "$(rows r50_100ep $B50 0.13 'compile, two calls; + two calls in one callable')"
    else
        part two50 80 "$(rows r50_100ep $B50 0.13 '+ two calls in one callable')"
    fi
    part authors50 40 "$(rows r50_100ep $B50 0.13 authors)"
    [[ $DEVICE == cuda ]] && part graphs50 75 "$(rows r50_100ep $B50 0.13 'compile with CUDA graphs')"
    part crop 30 "$(bench crop 0.2)"
fi

if [[ $what == dali ]]; then
    # ---- does it load, is it right, how fast; then from files to weights
    if compgen -G "$WORK/b/dali.tar.xz.?" > /dev/null; then
        part unpack 60 "cat $WORK/b/dali.tar.xz.? > $WORK/dali.tar.xz && $PYTHON -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' $WORK/dali.tar.xz $site && $PYTHON -c 'import nvidia.dali as d, nvidia; print(d.__version__, list(nvidia.__path__))'"
    fi
    part dali_tests 70 "$(tests tests/end_to_end/test_gpu.py -k 'crops_are_on_the_device or own_augmentation or follows_eager')"
    part dali_busy 40 "$PYTHON -m benchmarks.first_light under-load --device $DEVICE --images $photographs $tiny"
    part end_to_end 80 "$(bench end_to_end 0.6 --images "$photographs")"
    part loader 90 "$(bench loader 0.7 --images "$photographs")"
fi

# ---------------------------------------------------------------------------------------------------- what came out
{
    echo
    cat "$WORK"/results/ceilings.json 2> /dev/null
    "$PYTHON" -m benchmarks.first_light said --device "$DEVICE" --results "$WORK/results"
    head -n 12 "$WORK"/profiles/*.txt 2> /dev/null
} | cut -c1-260 | tee -a "$summary"
bundle
exit 0
