package audit

import (
	"context"
	"path/filepath"
	"testing"
)

// memoryDisk keeps nothing: the benchmark then measures the log's own work.
type memoryDisk struct{}

func (memoryDisk) create(string, string, []byte) (file, error) { return memoryDisk{}, nil }
func (memoryDisk) resume(string, string, int64) (file, error)  { return memoryDisk{}, nil }
func (memoryDisk) Write(b []byte) (int, error)                 { return len(b), nil }
func (memoryDisk) Sync() error                                 { return nil }
func (memoryDisk) Close() error                                { return nil }

func benchmarkAppend(b *testing.B, o Options, parallel int) {
	l := mustOpen(b, filepath.Join(b.TempDir(), "log"), o)
	b.SetParallelism(parallel)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if err := l.Append(context.Background(), entry(i)); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkAppendNoDisk(b *testing.B)   { benchmarkAppend(b, Options{disk: memoryDisk{}}, 64) }
func BenchmarkAppendDisk1(b *testing.B)    { benchmarkAppend(b, Options{}, 1) }
func BenchmarkAppendDisk64(b *testing.B)   { benchmarkAppend(b, Options{}, 32) }
func BenchmarkAppendDisk1024(b *testing.B) { benchmarkAppend(b, Options{}, 512) }
