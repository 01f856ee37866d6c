"""Run folders as eval_c2i.py, calibrate.py and robustness.py write them, with made-up numbers."""

import json

from PIL import Image

from models.artifacts import ROOT


def near(value: float, images: int = 50) -> dict:
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
        "baseline_bits": {"uniform": 640.0},
        "samples": {"FD_c10": 0.8 + shift, "FID768": 0.3, "label_accuracy": 0.7},
        "control": {"FD_c10": 0.011, "FID768": 0.015, "label_accuracy": 0.881},
        "reference_images": 10000,
    }  # fmt: skip


def calibration_of(order: str) -> dict:
    """What tools/calibrate.py writes, as far as a report reads it."""
    diagram = {"count": [9, 5], "confidence": near(0.0), "accuracy": near(0.0)}
    for key in ("value", "low", "high"):
        diagram["confidence"][key] = diagram["accuracy"][key] = [0.2, 0.6]
    measures = ("accuracy", "overconfidence_gap", "nll_bits", "ece_equal_width", "ece_equal_mass")
    overall = {name: near(0.0321) for name in (*measures, "ece_equal_width_if_calibrated")}
    gains = {"orders": 8, "log_mean_exp": near(499.0), "gain": near(1.5)}
    return {
        "images": 2000, "command": "uv run tools/calibrate.py", "trained_order": order,
        "inputs": {"checkpoint": order},
        "tokens": {
            "overall": overall | {"reliability": diagram},
            "by_step": {"t < 8": {"ece_equal_width": near(0.077)}},
            "temperature": {"temperature": near(0.91), "gain_bits_per_image": near(1.25)},
        },
        "orders": {
            "bits_per_image": {"raster": near(501.0), "random_0": near(502.0)},
            "bits_per_step": {"raster": near(8.0)},
            "ensemble": {"random": gains},
        },
        "classes": {"before": {"accuracy": near(0.456), "ece_equal_width": near(0.2)},
                    "after": {"ece_equal_width": near(0.1)}},
        "entropy": {"difference_bits_per_image": near(12.3)},
        "quality": {"ln p(class | sample)": {"spearman": near(0.4), "risk_coverage": [0.1] * 500}},
    }  # fmt: skip


def robustness_of(order: str) -> dict:
    """What tools/robustness.py writes."""
    names = ("bits_per_image", "ece_equal_width", "overconfidence_gap", "class_ece")
    rows = [
        {
            "severity": s,
            "psnr": near(40.0 - s),
            "FD_c10": 0.1 * s,
            "class_accuracy": near(0.5 - s / 20),
        }
        | {name: near(0.032 * s) for name in names}
        for s in range(6)
    ]
    context = [{"rho": rho, "more_bits_per_image": near(77 * rho)} for rho in (0.0, 0.1)]
    return {
        "images": 2000, "num_samples": 500, "command": "uv run tools/robustness.py",
        "corruptions": {"by_severity": rows, "by_corruption": {"fog": rows[1:]}},
        "context": {"uniform": context, "neighbours": context},
        "sampling": [{"rho": rho, "label_accuracy": near(0.8 - rho), "FD_c10": 1 + rho}
                     for rho in (0.0, 0.4)],
    }  # fmt: skip


def write_run(folder, order: str, shift: float = 0.0, studies: bool = True, **more):
    """Write a run folder with a curve and a picture of its own colour; return it."""
    folder.mkdir(parents=True)
    files = {"metrics.json": metrics_of(order, shift) | more}
    files["config.json"] = {"config": {"method": "randar", "order": order, "cluster_weight": 0.0}}
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
