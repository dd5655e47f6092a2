//! The matrix product, by cuBLAS.

use std::marker::PhantomData;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use half::bf16;

use super::{Element, rows_of};

/// What cuBLAS calls an element.
pub(crate) trait Scalar: Element {
    /// Its code.
    const CODE: sys::cudaDataType;
}

impl Scalar for f32 {
    const CODE: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;
}

impl Scalar for bf16 {
    const CODE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16BF;
}

/// A matrix in a buffer that stays borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    address: u64,
    rows: usize,
    /// Columns as it lies in memory, and the distance of rows.
    columns: usize,
    transposed: bool,
    buffer: PhantomData<&'a T>,
}

impl<'a, T: Scalar> Matrix<'a, T> {
    /// Row after row of `columns` elements.
    ///
    /// Panics when the last row is not whole.
    pub(crate) fn new(buffer: &'a impl DevicePtr<T>, columns: usize) -> Self {
        let rows = rows_of(buffer.len(), columns);
        let address = buffer.device_ptr(buffer.stream()).0;
        Matrix { address, rows, columns, transposed: false, buffer: PhantomData }
    }

    /// The same with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    fn operation(&self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }
}

/// `left right`, added to `out` where `accumulate`, else written to it. Sums are in f32, in an order that depends on the
/// shapes alone.
///
/// Panics when shapes do not fit.
pub(crate) fn product<T: Scalar, Out: Scalar>(
    device: &CudaDevice,
    out: &mut impl DevicePtrMut<Out>,
    left: Matrix<'_, T>,
    right: Matrix<'_, T>,
    accumulate: bool,
) -> Result<()> {
    let ((rows, depth), (right_depth, columns)) = (left.shape(), right.shape());
    assert_eq!(depth, right_depth, "depth of a matrix product");
    assert_eq!(out.len(), rows * columns, "result of a matrix product");
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    let (one, beta) = (1f32, if accumulate { 1f32 } else { 0f32 });
    let (address, _guard) = out.device_ptr_mut(&stream);
    // cuBLAS takes a matrix to lie column after column: what lies row after row is its transpose to it, and
    // (left right)^T = right^T left^T.
    // SAFETY: the handle belongs to the device's stream; the buffers stay borrowed until the product is enqueued and hold
    // as many elements as the shapes say, which was checked; alpha and beta are read from the host before it returns.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            right.operation(),
            left.operation(),
            columns as i32,
            rows as i32,
            depth as i32,
            (&raw const one).cast(),
            right.address as *const _,
            T::CODE,
            right.columns as i32,
            left.address as *const _,
            T::CODE,
            left.columns as i32,
            (&raw const beta).cast(),
            address as *mut _,
            Out::CODE,
            columns as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::testing::device;
    use crate::kernels::testing::numbers;

    #[test]
    fn products_of_all_shapes_and_types() {
        let Some(device) = device() else { return };
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (33, 64, 17)] {
            let (a, b) = (numbers(1, m * k), numbers(2, k * n));
            let plain = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum::<f32>();
            let transpose = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..columns * rows).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let upload = |x: &[f32]| device.clone_htod(x).unwrap();
            let (straight, turned) =
                ((upload(&a), upload(&b)), (upload(&transpose(&a, m, k)), upload(&transpose(&b, k, n))));
            for (left, right) in [
                (Matrix::new(&straight.0, k), Matrix::new(&straight.1, n)),
                (Matrix::new(&turned.0, m).transposed(), Matrix::new(&straight.1, n)),
                (Matrix::new(&straight.0, k), Matrix::new(&turned.1, k).transposed()),
                (Matrix::new(&turned.0, m).transposed(), Matrix::new(&turned.1, k).transposed()),
            ] {
                let mut out = device.clone_htod(&vec![2f32; m * n]).unwrap();
                product(&device, &mut out, left, right, false).unwrap();
                product(&device, &mut out, left, right, true).unwrap();
                for (i, found) in device.clone_dtoh(&out).unwrap().into_iter().enumerate() {
                    assert!((found - 2.0 * plain(i / n, i % n)).abs() < 1e-4, "{m} {k} {n}: {found}");
                }
            }
            let half =
                |x: &[f32]| device.clone_htod(&x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>()).unwrap();
            let (left, right) = (half(&a), half(&b));
            let mut out = device.alloc_zeros::<f32>(m * n).unwrap();
            product(&device, &mut out, Matrix::new(&left, k), Matrix::new(&right, n), false).unwrap();
            for (i, found) in device.clone_dtoh(&out).unwrap().into_iter().enumerate() {
                assert!((found - plain(i / n, i % n)).abs() < 0.02 * (k as f32).sqrt() + 0.01, "{m} {k} {n}: {found}");
            }
        }
    }
}
