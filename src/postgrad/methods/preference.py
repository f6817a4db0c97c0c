from dataclasses import dataclass
import torch
import torch.nn.functional as F
@dataclass
class PairScores:
    chosen_S: torch.Tensor
    rejected_S: torch.Tensor
    reference_chosen_S: torch.Tensor | None
    reference_rejected_S: torch.Tensor | None
    chosen_tokens_S: torch.Tensor
    rejected_tokens_S: torch.Tensor
    def ratios(self):
        a = self.chosen_S if self.reference_chosen_S is None else self.chosen_S - self.reference_chosen_S
        b = self.rejected_S if self.reference_rejected_S is None else self.rejected_S - self.reference_rejected_S
        return a, b
def sequence_sums(logps_N, document_N, tokens_S, ld_alpha=None):
    return torch.zeros(len(tokens_S), dtype=logps_N.dtype, device=logps_N.device).index_add(0, document_N, logps_N)
def pair_losses(scores, *, loss_type, loss_weights, beta, label_smoothing=0.0, chosen_share=0.0):
    a, b = scores.ratios()
    return -F.logsigmoid(beta * (a - b))
def pair_metrics(scores, beta):
    a, b = scores.ratios()
    return {"rewards/chosen": beta * a, "rewards/rejected": beta * b, "rewards/margins": beta * (a - b), "rewards/accuracies": (a > b).float(), "logps/chosen": scores.chosen_S, "logps/rejected": scores.rejected_S}
