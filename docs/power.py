"""The power table of docs/fit.md: ``python docs/power.py`` prints it (two minutes on one core)."""

import numpy as np
import torch

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory import fit

V, L, N = 4, 256, 400


def main() -> None:
    """Masked ancestral sampling of a chain with an exact denoiser, judged by each test."""
    rng = np.random.default_rng(5)
    initial = torch.as_tensor(rng.dirichlet(np.ones(V)))
    law = T.MarkovChain(initial, torch.as_tensor(rng.dirichlet(np.full(V, 0.7), size=V)), length=L)
    process = dd.Masked(V, dd.Linear())
    model, fresh, mean = law.denoiser(process), law.sample(N, seed=99), law.log_prob_moments()[0]
    print("| draws | log-likelihood minus exact, nats | z-test | transitions | KS on log p | energy |")
    print("|---|---|---|---|---|---|")
    for steps in (16, 32, 64, 128, 256, None):
        if steps is None:
            name, x = "exact", law.sample(N, seed=0)
        else:
            name = f"{steps} steps"
            x = dd.Sampler(process, model, S.Ancestral(), steps=steps).sample(N, seed=0).tokens
        log_p = law.log_prob(x)
        gap = f"{float(log_p.mean()) - mean:.2f} ± {float(log_p.std()) / N**0.5:.2f}"
        tests = (
            fit.log_likelihood_test(law, x),
            fit.transition_test(law, x),
            fit.two_sample(x, fresh, law.log_prob),
            fit.energy_test(x, fresh, 999),
        )
        print(f"| {name} | {gap} | {' | '.join(f'{test.pvalue:.1e}' for test in tests)} |", flush=True)


if __name__ == "__main__":
    main()
