"""The part of Caffe's file format that :mod:`fused_resnet.caffe` reads, as protobuf messages.

Fields have Caffe's names, numbers, types and defaults. In text, a field that is not here is an
error; in a binary file, whose network is not used but for its weights, it is skipped.
"""

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

#: As a .proto file, which would need a compiler, has it; no declaration inside another. Pooling's
#: sizes are repeated as a convolution's are: files read the same.
_SCHEMA = """
message BlobShape { repeated int64 dim = 1 [packed = true]; }
message BlobProto {
  optional int32 num = 1 [default = 0];
  optional int32 channels = 2 [default = 0];
  optional int32 height = 3 [default = 0];
  optional int32 width = 4 [default = 0];
  repeated float data = 5 [packed = true];
  optional BlobShape shape = 7;
  repeated double double_data = 8 [packed = true];
}

message NetParameter {
  optional string name = 1;
  repeated V1LayerParameter layers = 2;
  repeated string input = 3;
  repeated int32 input_dim = 4;
  optional bool force_backward = 5;
  optional NetState state = 6;
  optional bool debug_info = 7;
  repeated BlobShape input_shape = 8;
  repeated LayerParameter layer = 100;
}

enum Phase { TRAIN = 0; TEST = 1; }
message NetState {
  optional Phase phase = 1;
  optional int32 level = 2 [default = 0];
  repeated string stage = 3;
}
message NetStateRule {
  optional Phase phase = 1;
  optional int32 min_level = 2;
  optional int32 max_level = 3;
  repeated string stage = 4;
  repeated string not_stage = 5;
}

enum DimCheckMode { STRICT = 0; PERMISSIVE = 1; }
message ParamSpec {
  optional string name = 1;
  optional DimCheckMode share_mode = 2;
  optional float lr_mult = 3;
  optional float decay_mult = 4;
}

message LayerParameter {
  optional string name = 1;
  optional string type = 2;
  repeated string bottom = 3;
  repeated string top = 4;
  repeated float loss_weight = 5;
  repeated ParamSpec param = 6;
  repeated BlobProto blobs = 7;
  repeated NetStateRule include = 8;
  repeated NetStateRule exclude = 9;
  optional Phase phase = 10;
  repeated bool propagate_down = 11;
  optional TransformationParameter transform_param = 100;
  optional LossParameter loss_param = 101;
  optional AccuracyParameter accuracy_param = 102;
  optional ConcatParameter concat_param = 104;
  optional ConvolutionParameter convolution_param = 106;
  optional DataParameter data_param = 107;
  optional DropoutParameter dropout_param = 108;
  optional EltwiseParameter eltwise_param = 110;
  optional InnerProductParameter inner_product_param = 117;
  optional PoolingParameter pooling_param = 121;
  optional ReLUParameter relu_param = 123;
  optional SoftmaxParameter softmax_param = 125;
  optional ReshapeParameter reshape_param = 133;
  optional FlattenParameter flatten_param = 135;
  optional BatchNormParameter batch_norm_param = 139;
  optional ScaleParameter scale_param = 142;
  optional InputParameter input_param = 143;
}

enum LayerType {
  NONE = 0; ACCURACY = 1; BNLL = 2; CONCAT = 3; CONVOLUTION = 4; DATA = 5; DROPOUT = 6;
  EUCLIDEAN_LOSS = 7; FLATTEN = 8; HDF5_DATA = 9; HDF5_OUTPUT = 10; IM2COL = 11; IMAGE_DATA = 12;
  INFOGAIN_LOSS = 13; INNER_PRODUCT = 14; LRN = 15; MULTINOMIAL_LOGISTIC_LOSS = 16; POOLING = 17;
  RELU = 18; SIGMOID = 19; SOFTMAX = 20; SOFTMAX_LOSS = 21; SPLIT = 22; TANH = 23;
  WINDOW_DATA = 24; ELTWISE = 25; POWER = 26; SIGMOID_CROSS_ENTROPY_LOSS = 27; HINGE_LOSS = 28;
  MEMORY_DATA = 29; ARGMAX = 30; THRESHOLD = 31; DUMMY_DATA = 32; SLICE = 33; MVN = 34;
  ABSVAL = 35; SILENCE = 36; CONTRASTIVE_LOSS = 37; EXP = 38; DECONVOLUTION = 39;
}
message V1LayerParameter {
  repeated string bottom = 2;
  repeated string top = 3;
  optional string name = 4;
  optional LayerType type = 5;
  repeated BlobProto blobs = 6;
  repeated float blobs_lr = 7;
  repeated float weight_decay = 8;
  optional ConcatParameter concat_param = 9;
  optional ConvolutionParameter convolution_param = 10;
  optional DataParameter data_param = 11;
  optional DropoutParameter dropout_param = 12;
  optional InnerProductParameter inner_product_param = 17;
  optional PoolingParameter pooling_param = 19;
  optional EltwiseParameter eltwise_param = 24;
  optional AccuracyParameter accuracy_param = 27;
  optional ReLUParameter relu_param = 30;
  repeated NetStateRule include = 32;
  repeated NetStateRule exclude = 33;
  repeated float loss_weight = 35;
  optional TransformationParameter transform_param = 36;
  optional SoftmaxParameter softmax_param = 39;
  optional LossParameter loss_param = 42;
  repeated string param = 1001;
  repeated DimCheckMode blob_share_mode = 1002;
}

enum Engine { DEFAULT = 0; CAFFE = 1; CUDNN = 2; }
message InputParameter { repeated BlobShape shape = 1; }
message ConvolutionParameter {
  optional uint32 num_output = 1;
  optional bool bias_term = 2 [default = true];
  repeated uint32 pad = 3;
  repeated uint32 kernel_size = 4;
  optional uint32 group = 5 [default = 1];
  repeated uint32 stride = 6;
  optional FillerParameter weight_filler = 7;
  optional FillerParameter bias_filler = 8;
  optional uint32 pad_h = 9;
  optional uint32 pad_w = 10;
  optional uint32 kernel_h = 11;
  optional uint32 kernel_w = 12;
  optional uint32 stride_h = 13;
  optional uint32 stride_w = 14;
  optional Engine engine = 15;
  optional int32 axis = 16 [default = 1];
  optional bool force_nd_im2col = 17;
  repeated uint32 dilation = 18;
}
message BatchNormParameter {
  optional bool use_global_stats = 1 [default = true];
  optional float moving_average_fraction = 2 [default = 0.999];
  optional float eps = 3 [default = 1e-5];
}
message ScaleParameter {
  optional int32 axis = 1 [default = 1];
  optional int32 num_axes = 2 [default = 1];
  optional FillerParameter filler = 3;
  optional bool bias_term = 4 [default = false];
  optional FillerParameter bias_filler = 5;
}
message ReLUParameter {
  optional float negative_slope = 1 [default = 0];
  optional Engine engine = 2;
}
enum PoolMethod { MAX = 0; AVE = 1; STOCHASTIC = 2; }
enum RoundMode { CEIL = 0; FLOOR = 1; }
message PoolingParameter {
  optional PoolMethod pool = 1 [default = MAX];
  repeated uint32 kernel_size = 2;
  repeated uint32 stride = 3;
  repeated uint32 pad = 4;
  optional uint32 kernel_h = 5;
  optional uint32 kernel_w = 6;
  optional uint32 stride_h = 7;
  optional uint32 stride_w = 8;
  optional uint32 pad_h = 9;
  optional uint32 pad_w = 10;
  optional Engine engine = 11;
  optional bool global_pooling = 12 [default = false];
  optional RoundMode round_mode = 13 [default = CEIL];
}
enum EltwiseOp { PROD = 0; SUM = 1; MAX = 2; }
message EltwiseParameter {
  optional EltwiseOp operation = 1 [default = SUM];
  repeated float coeff = 2;
  optional bool stable_prod_grad = 3;
}
message InnerProductParameter {
  optional uint32 num_output = 1;
  optional bool bias_term = 2 [default = true];
  optional FillerParameter weight_filler = 3;
  optional FillerParameter bias_filler = 4;
  optional int32 axis = 5 [default = 1];
  optional bool transpose = 6 [default = false];
}
message SoftmaxParameter {
  optional Engine engine = 1;
  optional int32 axis = 2 [default = 1];
}
message DropoutParameter { optional float dropout_ratio = 1 [default = 0.5]; }
message ConcatParameter {
  optional uint32 concat_dim = 1 [default = 1];
  optional int32 axis = 2 [default = 1];
}
message ReshapeParameter {
  optional BlobShape shape = 1;
  optional int32 axis = 2 [default = 0];
  optional int32 num_axes = 3 [default = -1];
}

message FlattenParameter {
  optional int32 axis = 1 [default = 1];
  optional int32 end_axis = 2 [default = -1];
}

enum VarianceNorm { FAN_IN = 0; FAN_OUT = 1; AVERAGE = 2; }
message FillerParameter {
  optional string type = 1;
  optional float value = 2;
  optional float min = 3;
  optional float max = 4;
  optional float mean = 5;
  optional float std = 6;
  optional int32 sparse = 7;
  optional VarianceNorm variance_norm = 8;
}
enum DB { LEVELDB = 0; LMDB = 1; }
message DataParameter {
  optional string source = 1;
  optional float scale = 2;
  optional string mean_file = 3;
  optional uint32 batch_size = 4;
  optional uint32 crop_size = 5;
  optional bool mirror = 6;
  optional uint32 rand_skip = 7;
  optional DB backend = 8;
  optional bool force_encoded_color = 9;
  optional uint32 prefetch = 10;
}
message TransformationParameter {
  optional float scale = 1;
  optional bool mirror = 2;
  optional uint32 crop_size = 3;
  optional string mean_file = 4;
  repeated float mean_value = 5;
  optional bool force_color = 6;
  optional bool force_gray = 7;
}
message AccuracyParameter {
  optional uint32 top_k = 1;
  optional int32 axis = 2;
  optional int32 ignore_label = 3;
}
enum NormalizationMode { FULL = 0; VALID = 1; BATCH_SIZE = 2; NONE = 3; }
message LossParameter {
  optional int32 ignore_label = 1;
  optional bool normalize = 2;
  optional NormalizationMode normalization = 3;
}
"""

_DECLARATION = re.compile(r"(message|enum) (\w+) {([^}]*)}")
_FIELD = re.compile(r"(optional|repeated) (\w+) (\w+) = (\d+)(?: \[(\w+) = ([^\]]+)\])?;")
_VALUE = re.compile(r"(\w+) = (\d+);")


def _file() -> descriptor_pb2.FileDescriptorProto:
    """The schema as protobuf describes files."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    declared = {name: kind for kind, name, _ in _DECLARATION.findall(_SCHEMA)}
    for kind, name, body in _DECLARATION.findall(_SCHEMA):
        if kind == "enum":  # its values are names beside its own: it gets a scope to itself
            enum = file.message_type.add(name=f"{name}Enum").enum_type.add(name=name)
            for value, number in _VALUE.findall(body):
                enum.value.add(name=value, number=int(number))
            continue
        message = file.message_type.add(name=name)
        for label, of, field, number, option, setting in _FIELD.findall(body):
            added = message.field.add(name=field, number=int(number))
            added.label = kinds.Label.Value(f"LABEL_{label.upper()}")
            if of in declared:
                scope = f".{of}Enum" if declared[of] == "enum" else ""
                added.type_name = f".caffe{scope}.{of}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{of.upper()}")
            if option == "packed":
                added.options.packed = True
            elif option == "default":
                added.default_value = setting
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(_file().SerializeToString())

#: The message that a file holds: a prototxt as text, a caffemodel in binary.
NetParameter: Any = message_factory.GetMessageClass(
    _POOL.FindMessageTypeByName("caffe.NetParameter")
)


def from_text(data: bytes) -> Any:
    """The NetParameter of a prototxt; ValueError with the line where it is none."""
    try:
        return text_format.Parse(data.decode("utf-8"), NetParameter())
    except text_format.ParseError as error:
        what = str(error).partition(" : ")[2]
        raise ValueError(f"line {error.GetLine()}, column {error.GetColumn()}: {what}") from error


def from_binary(data: bytes) -> Any:
    """The NetParameter of a caffemodel; ValueError where it is none, or cut off inside a layer."""
    try:
        return NetParameter.FromString(data)
    except DecodeError as error:
        raise ValueError(f"not a binary caffemodel, or a truncated one ({error})") from error
