"""What tools/report.py reads, as the commands write it, with made-up numbers."""

import json

from helpers import script
from PIL import Image

from metrics.kept_numbers import FIRST
from models.artifacts import ROOT


def near(value: float, images: int = 2000) -> dict:
    """An estimate with an interval of 0.01 to each side."""
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "images": images}


def metrics_of(order: str, shift: float) -> dict:
    """What eval_c2i.py writes, all measures moved by `shift`."""
    return {
        "method": "randar", "trained_order": order, "parameters": 1234567, "train_steps": 300,
        "plan": {"order": order, "cfg": 3.0, "schedule": "linear"}, "num_samples": 2000,
        "seeds": [0], "cluster_weight": 0.0,
        "images_per_second": 31.25 + shift, "network_calls": 64, "device": "cpu",
        "git_commit": "0123456789",
        "command": f"uv run eval_c2i.py --checkpoint {order}.pth",
        "config": {"order": order, "batch": 500, "codes": f"{ROOT}/data/codes"},
        "inputs": {"checkpoint": order},
        "bits_per_image": {
            "random": {"mean": 510.0 + shift, "se": 0.26, "orders": 8},
            "raster": {"mean": 500.123456789 + shift, "se": 0.5, "orders": 1},
        },
        "baseline_bits": {"uniform": 640.0, "class_position": 624.2, "raster_bigram": 584.5},
        "samples": {"FD_c10": 0.8 + shift, "FID768": 0.3, "label_accuracy": 0.7 - shift / 100},
        "control": {"FD_c10": 0.011, "FID768": 0.015, "label_accuracy": 0.881},
        "reference_images": 10000,
    }  # fmt: skip


def calibration_of(order: str) -> dict:
    """What tools/calibrate.py writes, as far as a report reads it; every number is another."""
    more = 0.0 if order == "raster" else 0.0002
    diagram = {"count": [9, 5], "confidence": near(0.0), "accuracy": near(0.0)}
    for key in ("value", "low", "high"):
        diagram["confidence"][key] = diagram["accuracy"][key] = [0.2, 0.6]
    measures = ("ece_equal_width", "accuracy", "overconfidence_gap", "ece_equal_mass")
    measures += ("ece_equal_width_if_calibrated",)
    overall = {name: near(0.0321 + i / 1000 + more) for i, name in enumerate(measures)}
    overall["nll_bits"] = near(7.9 + 1000 * more)
    gains = {"orders": 8, "log_mean_exp": near(499.0), "gain": near(1.5 + 1000 * more)}
    bits = {"raster": 501.0, "reverse": 505.0, "random_0": 503.0}
    return {
        "images": 2000, "command": "uv run tools/calibrate.py", "trained_order": order,
        "inputs": {"checkpoint": order},
        "tokens": {
            "overall": overall | {"reliability": diagram},
            "by_step": {"t < 8": {"ece_equal_width": near(0.077 + more)}},
            "temperature": {"temperature": near(0.91 + 100 * more),
                            "gain_bits_per_image": near(1.25 + 100 * more)},
        },
        "orders": {
            "bits_per_image": {name: near(x + 10_000 * more) for name, x in bits.items()},
            "bits_per_step": {"raster": near(8.0)},
            "ensemble": {"random": gains},
        },
        "classes": {
            "before": {"accuracy": near(0.456 + 100 * more, 500),
                       "ece_equal_width": near(0.2 + 100 * more)},
            "after": {"ece_equal_width": near(0.1)},
        },
        "entropy": {"difference_bits_per_image": near(12.3 + 10_000 * more)},
        "quality": {"ln p(class | sample)": {"spearman": near(0.4), "risk_coverage": [0.1] * 500}},
    }  # fmt: skip


def robustness_of(order: str, shift: float = 0.0) -> dict:
    """What tools/robustness.py writes; every number is another, `shift` moves the context's."""
    more = 0.0 if order == "raster" else 0.1
    names = ("bits_per_image", "ece_equal_width", "overconfidence_gap", "class_ece")
    rows = [
        {
            "severity": s,
            "psnr": near(40.0 - s),
            "FD_c10": 0.1 * s,
            "class_accuracy": near(0.5 - s / 20 + more / (s + 1) * (-1 if s else 1)),
        }
        | {name: near((0.032 + i / 100) * s + more) for i, name in enumerate(names)}
        for s in range(6)
    ]
    context = {
        kind: [
            {"rho": rho, "more_bits_per_image": near(bits * (1 - more) * rho + shift * rho),
             "ece_equal_width": near(0.03 + more / 100 + shift / 10_000)}
            for rho in (0.0, 0.1, 0.4)
        ]
        for kind, bits in (("uniform", 77), ("neighbours", 22))
    }  # fmt: skip
    return {
        "images": 2000, "num_samples": 500, "command": "uv run tools/robustness.py",
        "corruptions": {
            "images": 200, "by_severity": rows, "by_corruption": {"fog": rows[1:]},
        },
        "context": context,
        "sampling": [
            {"rho": rho, "label_accuracy": near(0.8 - rho + more), "FD_c10": 1 + rho - more}
            for rho in (0.0, 0.4)
        ],
    }  # fmt: skip


def write_run(folder, order: str, shift: float = 0.0, studies: bool = True, seed: int = 0, **more):
    """Write a run folder with a curve and a picture of its own colour; return it."""
    folder.mkdir(parents=True)
    files = {"metrics.json": metrics_of(order, shift) | more}
    training = {"method": "randar", "order": order, "cluster_weight": 0.0, "seed": seed}
    training |= {"steps": 300, "batch": 64, "model": "nano"}
    files["config.json"] = {"config": training}
    if studies:
        files |= {
            "calibration.json": calibration_of(order),
            "robustness.json": robustness_of(order),
        }
    for name, found in files.items():
        (folder / name).write_text(json.dumps(found))
    rows = [{"step": s, "train_bits": 9.0, "lr": 1e-3} for s in range(1, 1001)]
    rows[499]["heldout_bits"], rows[999]["heldout_bits"] = 8.0, 8.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (4, 4), (round(40 * shift), 90, 0)).save(folder / "samples.png")
    return folder


def write_pair(tmp_path) -> list:
    """Write two runs under the names that the README's blocks ask for; return their folders."""
    return [
        write_run(tmp_path / "results" / name, name.split("_")[1], shift)
        for name, shift in zip(FIRST.values(), (0.0, 0.25), strict=True)
    ]


def report_config(tmp_path, *runs, **more):
    """A config of tools/report.py that keeps and shows below `tmp_path` only."""
    return script("tools/report.py").ReportConfig(
        runs=tuple(runs), kept=tmp_path / "kept", trainings=tmp_path / "none",
        out=tmp_path / "page", **more,
    )  # fmt: skip


def write_single(folder, name: str, found: dict):
    """Write a file of SINGLE; return its folder."""
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(found))
    return folder


def sweep_of() -> dict:
    """What tools/sweep_cfg.py writes."""
    rows = [
        {"plan": {"steps": steps, "cfg": 3.0}, "num_samples": 1000,
         "samples": {"FD_c10": 1 + 1 / steps, "label_accuracy": 0.4},
         "control": {"FD_c10": 0.05, "label_accuracy": 0.88}}
        for steps in (64, 16)
    ]  # fmt: skip
    return {"rows": rows, "best": {"steps": 64}}


def tokenizer_of() -> dict:
    """What tools/measure_tokenizer.py writes."""
    quality = {"FD_c10": 0.7, "FID768": 0.2, "recall768": 0.13, "label_accuracy": 0.76}
    codes = {"codebook_usage": 1.0, "rFD_c10": 0.61, "rFID768": 0.11, "as_samples": quality}
    return {
        "parameters": 1930196, "codebook_size": 1024, "grid": 8, "train_steps": 5000,
        "train_batch": 128, "images": 10000, "inputs": {"tokenizer": "1"},
        "codes": {"nearest": codes | {"psnr": near(25.8), "perplexity": 957.0, "search": 0},
                  "stored": codes | {"psnr": near(26.3), "perplexity": 947.0, "search": 1}},
        "control": {"FD_c10": 0.011, "FID768": 0.015, "label_accuracy": 0.8809},
    }  # fmt: skip


def quickstart_of() -> dict:
    """What tools/quickstart.py writes."""
    orders = {
        order: {"label_accuracy": accuracy, "num_samples": 500}
        for order, accuracy in (("raster", 0.976), ("random", 0.934))
    }
    return {"minutes": 3.96, "cores": 2, "resumed": False, "orders": orders}


def benchmark_of() -> dict:
    """What tools/benchmark.py writes."""
    columns = [
        "batch",
        "stage",
        "method",
        "order",
        "what",
        "network_calls",
        "images_per_second",
        "peak_memory_gb",
    ]
    rows = [
        (128, 2, None, None, "training", None, 320.0, 1.1),
        (500, 3, None, None, "encoding, --search 0", None, 500.0, 1.1),
        (500, 3, None, None, "encoding, --search 1", None, 62.5, 1.1),
        (64, 4, "randar", "random", "training", None, 100.0, 1.4),
        (500, 5, "randar", "random", "sampling", 64, 50.0, 1.0),
        (500, 5, "randar", "random", "sampling", 16, 70.0, 1.0),
        (64, 4, "gpt", "raster", "training", None, 200.0, 1.2),
        (500, 5, "gpt", "raster", "sampling", 64, 90.0, 1.3),
    ]
    rows = [dict(zip(columns, row, strict=True)) | {"model": "nano"} for row in rows]
    about = {"threads": 2, "device": "cpu", "cpu": "A CPU", "peak_memory": "resident"}
    return about | {"rows": rows}


def write_everything(tmp_path) -> list:
    """Write all folders that the README's blocks ask for; return them, the pair first."""
    pair = write_pair(tmp_path)
    results = tmp_path / "results"
    spread = {"FD_c10": {"mean": 0.9, "sd": 0.0123}, "label_accuracy": {"mean": 0.71, "sd": 0.004}}
    for name, weight in (("five_rar_anneal", 0.5), ("five_gpt_raster", 0.0)):
        _, method, order = name.split("_")
        about = {"method": method, "trained_order": order, "cluster_weight": weight}
        folder = write_run(results / name, "raster", studies=False, seeds=[0, 1, 2],
                           over_seeds=spread, **about)  # fmt: skip
        pair.append(folder)
    (pair[-1] / "sweep.json").write_text(json.dumps(sweep_of()))
    for order, sd in (("raster", 0.0125), ("random", 0.025)):
        name, both = f"randar_{order}_nano_cifar10_seeds", {"mean": 0.7, "sd": sd}
        folder = write_run(results / name, order, studies=False, seeds=[0, 1],
                           over_seeds={"FD_c10": both})  # fmt: skip
        found = json.loads((folder / "metrics.json").read_text())
        del found["bits_per_image"]
        (folder / "metrics.json").write_text(json.dumps(found))
        pair.append(folder)
        for seed in (0, 1):
            shift = (seed + 1) * (3 if order == "random" else 1)
            first = "ab"[seed] if order == "raster" else "ba"[seed]
            name = f"{first}_randar_{order}"  # in the order of names their seeds differ
            pair.append(write_run(results / name, order, shift, studies=False, seed=seed))
            (pair[-1] / "robustness.json").write_text(json.dumps(robustness_of(order, shift)))
    singles = {"vqvae_cifar10/tokenizer": tokenizer_of(), "benchmark/benchmark": benchmark_of(),
               "quickstart/quickstart": quickstart_of()}  # fmt: skip
    for path, found in singles.items():
        folder, name = path.split("/")
        pair.append(write_single(results / folder, f"{name}.json", found))
    return pair


def readme_of(names) -> str:
    """A README with these blocks, and text around them that must stay."""
    blocks = "".join(f"<!-- report:{name} -->\nold {name}\n<!-- /report -->\n\n" for name in names)
    return f"# Title \t\r\n| 1 | ± |\r\n\n{blocks}last line without end  "
