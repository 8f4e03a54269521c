"What torch.hub.load finds here, such as torch.hub.load('<owner>/fastattn', 'attn_timm', 'resnet50', stages=[1,2], pretrained=True)"
dependencies = ['fastai','timm','torch','torchvision']
from fastattn.models.timm import attn_timm,load_model
from fastattn.models.xresnet import *
