/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu/isa/isa.h"

const struct isa_ops ISA(isa_ops) = {
	.gemm = ISA(gemm),
	.dropout = ISA(dropout),
	.bias_act = ISA(bias_act),
	.act_grad = ISA(act_grad),
	.add_rect = ISA(add_rect),
	.col_sum = ISA(col_sum),
	.residual = ISA(residual),
	.embed_row = ISA(embed_row),
	.glu = ISA(glu),
	.glu_back = ISA(glu_back),
	.rotary_row = ISA(rotary_row),
	.norm_row = ISA(norm_row),
	.norm_back_row = ISA(norm_back_row),
	.norm_back_cols = ISA(norm_back_cols),
	.attn_mul = ISA(attn_mul),
	.attn_pack = ISA(attn_pack),
	.attn_pack_turned = ISA(attn_pack_turned),
	.attn_softmax = ISA(attn_softmax),
	.scale_rows = ISA(scale_rows),
	.dot_rows = ISA(dot_rows),
	.attn_backward = ISA(attn_backward),
	.xent_row = ISA(xent_row),
	.fold = ISA(fold),
	.adam = ISA(adam),
};
