// All of headwise.
#pragma once

#include "headwise/analysis.h"
#include "headwise/attention.h"
#include "headwise/backends.h"
#include "headwise/dense_attention.h"
#include "headwise/explain.h"
#include "headwise/files.h"
#include "headwise/gates.h"
#include "headwise/importance.h"
#include "headwise/model.h"
#include "headwise/multihead_attention.h"
#include "headwise/pruning.h"
#include "headwise/selection.h"
#include "headwise/statistics.h"
#include "headwise/trace.h"
#include "headwise/version.h"
#include "headwise/weights.h"
