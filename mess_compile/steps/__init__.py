"""The Python API: one function per command, working in a workspace, from artefact to artefact."""

from __future__ import annotations

from mess_compile.data_folder import DataFolder
from mess_compile.engines.prepare import RecipeBuild
from mess_compile.network import Gate
from mess_compile.planned_step import PlannedStep
from mess_compile.report.collect import compare, report
from mess_compile.reporter import Reporter
from mess_compile.runtime.serve.verify import verify_bundle as verify
from mess_compile.search.requirement import Requirement
from mess_compile.ship.client import ShipOptions, parse_place, plan_ship, rollback, ship
from mess_compile.ship.client import look as ships
from mess_compile.steps.attach import Attached, AttachOptions, attach
from mess_compile.steps.bench import BenchOptions, bench, bench_deadline, plan_bench
from mess_compile.steps.build import EngineOptions, build, plan_build
from mess_compile.steps.bundle import BundleOptions, bundle, plan_bundle
from mess_compile.steps.devices import KnownDevice, devices, doctor, inspect
from mess_compile.steps.evaluate import EvaluateOptions, evaluate, plan_evaluate
from mess_compile.steps.export import export
from mess_compile.steps.profile import ProfileOptions, Subset, estimate, plan_profile, profile
from mess_compile.steps.run import ImageFailure, ImageResult, RunError, RunOptions, VideoResult, run
from mess_compile.steps.search import SearchOptions, search, search_and_explain, shared
from mess_compile.steps.train import (
    NetworkChoice,
    TrainingData,
    TrainOptions,
    plan_train,
    train,
    train_baseline,
    training_data,
)
from mess_compile.workspace import Workspace, open_workspace

__all__ = [
    "AttachOptions",
    "Attached",
    "BenchOptions",
    "BundleOptions",
    "DataFolder",
    "EngineOptions",
    "EvaluateOptions",
    "Gate",
    "ImageFailure",
    "ImageResult",
    "KnownDevice",
    "NetworkChoice",
    "PlannedStep",
    "ProfileOptions",
    "RecipeBuild",
    "Reporter",
    "Requirement",
    "RunError",
    "RunOptions",
    "SearchOptions",
    "ShipOptions",
    "Subset",
    "TrainOptions",
    "TrainingData",
    "VideoResult",
    "Workspace",
    "attach",
    "bench",
    "bench_deadline",
    "build",
    "bundle",
    "compare",
    "devices",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "open_workspace",
    "parse_place",
    "plan_bench",
    "plan_build",
    "plan_bundle",
    "plan_evaluate",
    "plan_profile",
    "plan_ship",
    "plan_train",
    "profile",
    "report",
    "rollback",
    "run",
    "search",
    "search_and_explain",
    "shared",
    "ship",
    "ships",
    "train",
    "train_baseline",
    "training_data",
    "verify",
]
