"""Newtonised orthogonal matching pursuit over azimuth, elevation and inverse range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from physics.fit import Fit, Measurement, evaluate, refine
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import power
from physics.scene import SceneConfig, SourceMode
from physics.spectrum import PolarGrid
from physics.steering import Wavefront, steering_vector

def run(y, H, codes, array, wavefront, mode, max_sources, grid, n_exact=32, n_new=3, n_joint=5, n_starts=1):
    m = Measurement.of(y, H, codes, array, wavefront, mode)
    real = y.real.dtype
    pos = grid.positions(dtype=real).reshape(-1,3)
    coords = torch.cat([pos[:,:2], pos[:,2:].reciprocal()],-1)
    a = grid.steering(array, wavefront, dtype=y.dtype)
    bounds = torch.stack([coords.amin(0), coords.amax(0)])
    B=len(m)
    residual=m.y
    fits=[]
    current=torch.zeros(B,0,3,dtype=real)
    for k in range(max_sources):
        z=m.back_projected(residual)
        score=power(z.flatten(0,1)@a.mH).unflatten(0,(B,-1)).sum(1)
        top=score.topk(n_exact,-1).indices
        cand=a[top]  # B,P,N
        rows=m.rows(cand) # B,G,P,R
        norm=power(rows).sum(-1)
        exact=(power((rows.conj()@residual.unsqueeze(-1)).squeeze(-1))/norm.clamp_min(1e-30)).sum(1)
        best=exact.argmax(-1)
        new=coords[top.gather(1,best[:,None])]  # B,1,3
        if n_new and k:
            from dataclasses import replace
            new=refine(replace(m,y=residual),new,bounds,n_new).coordinates
        current=torch.cat([current,new],1)
        f=refine(m,current,bounds,n_joint)
        fits.append(f); current=f.coordinates; residual=f.residual
    return m,fits
