// Compares the declarations of ggml.hpp, and the numbers that the kernels use, with the headers of the installed ggml.
//
// The headers are installed by `make native`, which runs these checks (python -m tests.kernels headers).
// hatch_build.py defines AFTERWORD_GGML_HEADERS where the headers lie beside llama-cpp-python. A difference ends the compilation,
// so the package is installed without the accelerator. ggml-backend-impl.h is never installed: the declarations copied from it are
// protected by the version that accelerator.py knows.

#pragma once

#ifdef AFTERWORD_GGML_HEADERS

#include <ggml-backend.h>
#include <ggml.h>

#include <cstddef>

#include "activations.hpp"
#include "elementwise.hpp"
#include "ggml.hpp"
#include "matmul.hpp"
#include "routing.hpp"

#define SAME_FIELD(ours, our_field, theirs, their_field)                                                                      \
    static_assert(                                                                                                            \
        offsetof(ours, our_field) == offsetof(theirs, their_field) && sizeof(ours::our_field) == sizeof(theirs::their_field), \
        #theirs "." #their_field " of the installed ggml is not what ggml.hpp declares")
#define SAME_NUMBER(ours, theirs) static_assert((int)(ours) == (int)(theirs), #theirs " of the installed ggml has another number")

static_assert(sizeof(Tensor) == sizeof(ggml_tensor), "ggml_tensor of the installed ggml has another size");
SAME_FIELD(Tensor, type, ggml_tensor, type);
SAME_FIELD(Tensor, buffer, ggml_tensor, buffer);
SAME_FIELD(Tensor, ne, ggml_tensor, ne);
SAME_FIELD(Tensor, nb, ggml_tensor, nb);
SAME_FIELD(Tensor, op, ggml_tensor, op);
SAME_FIELD(Tensor, params, ggml_tensor, op_params);
SAME_FIELD(Tensor, flags, ggml_tensor, flags);
SAME_FIELD(Tensor, src, ggml_tensor, src);
SAME_FIELD(Tensor, view_src, ggml_tensor, view_src);
SAME_FIELD(Tensor, view_offset, ggml_tensor, view_offs);
SAME_FIELD(Tensor, data, ggml_tensor, data);

static_assert(sizeof(Properties) == sizeof(ggml_backend_dev_props), "ggml_backend_dev_props has another size");
SAME_FIELD(Properties, name, ggml_backend_dev_props, name);
SAME_FIELD(Properties, description, ggml_backend_dev_props, description);
SAME_FIELD(Properties, memory_free, ggml_backend_dev_props, memory_free);
SAME_FIELD(Properties, memory_total, ggml_backend_dev_props, memory_total);
SAME_FIELD(Properties, type, ggml_backend_dev_props, type);
SAME_FIELD(Properties, id, ggml_backend_dev_props, device_id);
SAME_FIELD(Properties, async, ggml_backend_dev_props, caps.async);
SAME_FIELD(Properties, mmap, ggml_backend_dev_props, caps.mmap_support);

SAME_NUMBER(ACCELERATOR, GGML_BACKEND_DEVICE_TYPE_ACCEL);
SAME_NUMBER(TO_COMPUTE, GGML_TENSOR_FLAG_COMPUTE);
SAME_NUMBER(F32, GGML_TYPE_F32);
SAME_NUMBER(F16, GGML_TYPE_F16);
SAME_NUMBER(I32, GGML_TYPE_I32);
SAME_NUMBER(I64, GGML_TYPE_I64);
SAME_NUMBER(activations::Tanh::UNARY, GGML_UNARY_OP_TANH);
SAME_NUMBER(activations::ReLU::UNARY, GGML_UNARY_OP_RELU);
SAME_NUMBER(activations::Sigmoid::UNARY, GGML_UNARY_OP_SIGMOID);
SAME_NUMBER(activations::GELU::UNARY, GGML_UNARY_OP_GELU);
SAME_NUMBER(activations::QuickGELU::UNARY, GGML_UNARY_OP_GELU_QUICK);
SAME_NUMBER(activations::SiLU::UNARY, GGML_UNARY_OP_SILU);
SAME_NUMBER(activations::ErrorGELU::UNARY, GGML_UNARY_OP_GELU_ERF);
SAME_NUMBER(activations::SoftPlus::UNARY, GGML_UNARY_OP_SOFTPLUS);
SAME_NUMBER(activations::ReLU::GLU, GGML_GLU_OP_REGLU);
SAME_NUMBER(activations::GELU::GLU, GGML_GLU_OP_GEGLU);
SAME_NUMBER(activations::SiLU::GLU, GGML_GLU_OP_SWIGLU);
SAME_NUMBER(activations::LimitedSwiGLUPlusOne::GLU, GGML_GLU_OP_SWIGLU_OAI);
SAME_NUMBER(activations::ErrorGELU::GLU, GGML_GLU_OP_GEGLU_ERF);
SAME_NUMBER(activations::QuickGELU::GLU, GGML_GLU_OP_GEGLU_QUICK);
SAME_NUMBER(activations::LimitedSwiGLU::GLU, GGML_GLU_OP_SWIGLU_CLAMP);
SAME_NUMBER(routing::DESCENDING, GGML_SORT_ORDER_DESC);
SAME_NUMBER(elementwise::IN_PAIRS, GGML_ROPE_TYPE_NORMAL);
SAME_NUMBER(elementwise::IN_HALVES, GGML_ROPE_TYPE_NEOX);
SAME_NUMBER(elementwise::IN_SECTIONS, GGML_ROPE_TYPE_MROPE);
SAME_NUMBER(elementwise::INTERLEAVED, GGML_ROPE_TYPE_IMROPE);

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__ARM_FEATURE_DOTPROD)  // as in matmul.hpp
SAME_NUMBER(products::Q8_0::ID, GGML_TYPE_Q8_0);
SAME_NUMBER(products::Q4_0::ID, GGML_TYPE_Q4_0);
SAME_NUMBER(products::Q4_1::ID, GGML_TYPE_Q4_1);
SAME_NUMBER(products::Q5_0::ID, GGML_TYPE_Q5_0);
SAME_NUMBER(products::Q5_1::ID, GGML_TYPE_Q5_1);
SAME_NUMBER(products::IQ4_NL::ID, GGML_TYPE_IQ4_NL);
SAME_NUMBER(products::IQ4_XS::ID, GGML_TYPE_IQ4_XS);
SAME_NUMBER(products::MXFP4::ID, GGML_TYPE_MXFP4);
SAME_NUMBER(products::Q2_K::ID, GGML_TYPE_Q2_K);
SAME_NUMBER(products::Q3_K::ID, GGML_TYPE_Q3_K);
SAME_NUMBER(products::Q4_K::ID, GGML_TYPE_Q4_K);
SAME_NUMBER(products::Q5_K::ID, GGML_TYPE_Q5_K);
SAME_NUMBER(products::Q6_K::ID, GGML_TYPE_Q6_K);
SAME_NUMBER(products::Float16::ID, GGML_TYPE_F16);
SAME_NUMBER(products::BFloat16::ID, GGML_TYPE_BF16);
SAME_NUMBER(products::Float32::ID, GGML_TYPE_F32);
#endif

#undef SAME_FIELD
#undef SAME_NUMBER

#endif
