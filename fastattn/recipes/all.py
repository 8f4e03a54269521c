from .cache import *
from .data import *
from .run import *
from .answer import *
from .compare import *
from .options import *
from .train import *
from .leaderboard import *
