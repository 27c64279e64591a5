"""Cases small enough for a test, and records without a measurement."""

from dataclasses import replace

from opacus_bpclip.bench.results import ArmResult, BenchRecord, Comparison
from opacus_bpclip.bench.settings import CASES, GROWTHS, Point, Settings

_SIZES = {"width": 8, "depth": 1, "length": 4, "vocabulary": 11}


def tiny(name):
    case = CASES[name]
    sizes = {size: value for size, value in _SIZES.items() if size in case.sizes}
    return replace(case, batch_size=2, **sizes)


SETTINGS = Settings()


def arm(name, seconds, peaks=(2**20,)):
    return ArmResult(name, tuple(seconds), peaks)


def comparison(name, *arms, axis=None, value=None):
    case = CASES[name]
    if axis is not None:
        case = replace(case, **{GROWTHS[axis].field: value})
    return Comparison(point=Point(name, axis, case), parameters=1234, arms=arms)


def record(*comparisons):
    versions = {"python": "3.11", "torch": "2.13", "opacus": "1.6", "opacus_bpclip": "0.1"}
    return BenchRecord.new(SETTINGS, versions=versions, results=comparisons)


CNN = comparison(
    "cnn26k",
    arm("non-private", [1.0, 2.0, 4.0], (100 * 2**20, 200 * 2**20, 100 * 2**20)),
    arm("layerwise-weighted", [1.1, 2.2, 4.8], (105 * 2**20,)),
    arm("joint-exact", [2.0, 4.0, 8.0], (150 * 2**20,)),
    arm("hooks", [3.0, 6.0, 12.0], (300 * 2**20,)),
    arm("ghost", [2.5, 5.0, 10.0], (350 * 2**20,)),
    ArmResult("ew", failure="RuntimeError: no rule for Tanh"),
)
CURVE = tuple(
    comparison(
        "mlp",
        arm("non-private", [1.0, 1.0]),
        arm("joint-exact", [ratio, ratio], None),
        axis="width",
        value=width,
    )
    for width, ratio in ((128, 1.25), (256, 1.125))
)
