"The benchmark of speed: the yardstick against golden rewards, operations against PyTorch's count, drift of half precision, and the script for a GPU."
import json, os, subprocess, sys
from dataclasses import replace

import pytest, torch
from project import ROOT
from test_golden_rewards import GOLDEN  # noqa: F401
