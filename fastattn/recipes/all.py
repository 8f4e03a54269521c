from .cache import *
from .data import *
from .options import *
from .leaderboard import *
from .train import *
