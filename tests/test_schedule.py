"""The paper's learning rate (Vaswani et al., 2017, section 5.3) is transformers' "inverse_sqrt" with the right peak."""

import pytest
import torch
from transformers import get_inverse_sqrt_schedule


@pytest.mark.parametrize(("d_model", "warmup"), [(512, 4000), (128, 2000)])
def test_inverse_sqrt_with_the_right_peak_is_the_papers_schedule(d_model, warmup):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=(d_model * warmup) ** -0.5)
    schedule = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup)
    for step in range(1, 20001):
        optimizer.step()
        schedule.step()
        expected = d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule.get_last_lr()[0] == pytest.approx(expected, rel=1e-12, abs=0), step
