from .core import *
from .layers.all import *
from .models.all import *
from .callback import *
from .learner import *
from .recipes.all import *
from .interpret import *
from .bench import *
